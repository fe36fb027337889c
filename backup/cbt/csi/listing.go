package csi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/varve-io/varve/backup/cbt"
)

// receiver returns the messages of a call, io.EOF after the last.
type receiver func() (message, error)

// message is the answer of both calls.
type message interface {
	GetBlockMetadataType() api.BlockMetadataType
	GetVolumeCapacityBytes() int64
	GetBlockMetadata() []*api.BlockMetadata
}

func receive[M any, P interface {
	*M
	message
}](stream grpc.ServerStreamingClient[M], err error) (receiver, error) {
	if err != nil {
		return nil, err
	}
	return func() (message, error) {
		m, err := stream.Recv()
		return P(m), err
	}, nil
}

// listing is one list, from as many calls as it takes.
type listing struct {
	s     *Session
	name  string
	open  func(ctx context.Context, token string, offset int64, results int32) (receiver, error)
	merge *merge

	results int32
	failed  int // calls in a row without a new range
	breaks  int // in all
	// cleanAt is the offset of the last clean end; -1 for none. The same offset twice is the
	// end.
	cleanAt int64
	refused Token // the last refused token
	// renewed means that another token was tried since the last new range.
	renewed bool
}

func (s *Session) newListing(name string, size int64, emit func(cbt.Extent) error) *listing {
	return &listing{s: s, name: name, merge: newMerge(name, size, emit), results: s.opt.MaxResults, cleanAt: -1}
}

// run makes calls until the list is complete.
func (l *listing) run(ctx context.Context) error {
	for {
		before := l.merge.end

		err := l.call(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}

		if l.merge.end > before {
			l.failed, l.renewed = 0, false
		}

		var failure *callError

		switch {
		case err == nil:
			complete, err := l.cleanEnd(ctx)
			if complete || err != nil {
				return err
			}
		case errors.As(err, &failure):
			if err := l.recover(ctx, failure); err != nil {
				return err
			}
		default:
			return err // of emit, or invalid data of the driver
		}
	}
}

// cleanEnd judges a call that ended without an error: a driver may have been cancelled, and
// end as if complete.
func (l *listing) cleanEnd(ctx context.Context) (complete bool, err error) {
	end := l.merge.end
	if l.merge.complete() || l.cleanAt == end {
		return true, l.merge.finish()
	}

	early := l.cleanAt >= 0
	l.cleanAt = end

	if !early {
		return false, nil
	}

	l.s.count(func(st *Stats) { st.EarlyEnds++ })

	level := slog.LevelInfo
	if l.breaks == 0 {
		level = slog.LevelWarn // once is enough to identify such a driver
	}

	l.s.opt.Log.Log(ctx, level, "the list of changed blocks ended early as if it were complete; continuing", "source", l.name, "offset", end)

	if l.breaks++; l.breaks > l.s.opt.Retry.Breaks {
		return false, &cbt.Error{
			Source: l.name, Kind: cbt.ErrTruncated, Reason: cbt.ReasonTruncated,
			Detail: fmt.Sprintf("the list broke %d times", l.breaks),
		}
	}
	return false, nil
}

// recover waits until a failed call may be made again, or turns the failure into the
// error that ends the list.
func (l *listing) recover(ctx context.Context, e *callError) error {
	s := l.s

	switch {
	case e.code == codes.Unauthenticated && l.freshToken(ctx):
		return nil
	case e.step == stop:
		return &cbt.Error{Source: l.name, Kind: cbt.ErrDenied, Detail: s.deniedDetail(e.code), Cause: e.cause}
	case e.step == down:
		return &cbt.Error{Source: l.name, Kind: cbt.ErrUnavailable, Reason: e.reason, Cause: e.cause}
	}

	s.count(func(st *Stats) { st.Breaks++ })

	l.failed++
	l.breaks++

	if l.failed >= s.opt.Retry.Attempts || l.breaks > s.opt.Retry.Breaks {
		kind := cbt.ErrTruncated
		if e.reason == "" { // there was no token to call with
			kind = cbt.ErrDenied
		}
		return &cbt.Error{
			Source: l.name, Kind: kind, Reason: e.reason, Cause: e.cause,
			Detail: fmt.Sprintf("given up at offset %d after %d failed calls in a row, %d in all", l.merge.end, l.failed, l.breaks),
		}
	}

	if e.code == codes.ResourceExhausted && (l.results == 0 || l.results > cautiousResults) {
		l.results = cautiousResults
	}

	wait := s.opt.Retry.wait(l.failed, s.opt.Random())
	s.opt.Log.InfoContext(ctx, "the list of changed blocks broke off; continuing", "source", l.name, "offset", l.merge.end,
		"error", e.cause, "reason", string(e.reason), "wait", wait)

	if err := sleep(ctx, s.opt.Clock, wait); err != nil {
		return err
	}

	if e.code == codes.Unavailable || e.reason == cbt.ReasonStalled {
		return s.reconnect()
	}
	return nil
}

// freshToken reports whether there is another token than the refused one, which may have
// expired just before.
func (l *listing) freshToken(ctx context.Context) bool {
	if l.renewed {
		return false
	}

	l.renewed = true

	if r, ok := l.s.opt.Tokens.(Refresher); ok {
		r.Refused(l.refused)
	}

	token, err := l.s.opt.Tokens.Token(ctx)
	return err == nil && !token.Equal(l.refused)
}

// call makes one call and merges its answer. Its errors are *callError, those of merge and
// those of emit; nil is a clean end.
func (l *listing) call(ctx context.Context) error {
	s := l.s

	token, err := s.opt.Tokens.Token(ctx)
	if err != nil {
		return &callError{step: again, cause: err, code: codes.Unknown}
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	stall := s.opt.Clock.AfterFunc(s.opt.StallTimeout, func() { cancel(errStalled) })
	defer stall.Stop()

	s.count(func(st *Stats) { st.Calls++ })
	l.merge.begin()

	next, err := l.open(ctx, token.text(), l.merge.end, l.results)
	for err == nil {
		var m message
		if m, err = next(); err != nil {
			break
		}

		stall.Reset(s.opt.StallTimeout)

		ranges := m.GetBlockMetadata()
		s.count(func(st *Stats) { st.Messages++; st.Ranges += int64(len(ranges)) })

		if err := l.merge.add(m.GetBlockMetadataType(), m.GetVolumeCapacityBytes(), ranges); err != nil {
			return err
		}
	}

	if errors.Is(err, io.EOF) {
		return nil
	}

	l.refused = token
	return s.judge(err, context.Cause(ctx), token)
}

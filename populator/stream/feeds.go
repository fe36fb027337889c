package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/populator/hold"
)

// Feed is one command that gets a recovery point as its standard input.
type Feed struct {
	// App is where Command runs, by the container's sh, for Limit at most.
	App     hold.Target
	Command string
	Limit   time.Duration
	// Bytes of the recovery point.
	Bytes int64
	// Mover has them (Serve).
	Mover hold.Target
}

// A mover that has a stream waits to be asked for each frame: what was not asked for stands on no
// connection, and a connection that stands still is cut (feed.sh). The controller writes a byte for each.
const (
	askBeat  = 'b' // the controller is there
	askFrame = 'n' // the next frame
)

// asked is how many frames the controller asks for in advance, so that the mover reads while the command works.
const asked = 4

// BeginFeed passes a recovery point on to a command; changed is called when it has ended. The command is
// started once the first of its bytes came.
func (s *Streams) BeginFeed(k Key, f Feed, changed func()) error {
	return s.begin(k, types.NamespacedName{}, changed, func(ctx context.Context, one *Stream) (End, error) { return one.feed(ctx, s.Exec, f) })
}

// frame is what came from a mover.
type frame struct {
	data []byte
	err  error
}

// feed connects the two execs.
func (s *Stream) feed(ctx context.Context, e Exec, f Feed) (End, error) {
	none := End{ExitCode: -1}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	asks, ask := io.Pipe()
	from, frames := io.Pipe()
	relayed := make(chan struct{})
	go func() {
		defer close(relayed)
		err := e.Stream(ctx, f.Mover, Relayed, asks, frames, io.Discard)
		if err == nil {
			err = io.EOF // Reader says whether that is its end
		}
		_, _ = frames.CloseWithError(err), asks.CloseWithError(io.ErrClosedPipe)
	}()
	came := make(chan frame, asked+1) // it takes all that was asked for
	go read(from, came)
	defer func() {
		stop()
		_, _ = ask.Close(), from.Close()
		<-relayed
	}()
	go func() {
		tick := time.NewTicker(streamBeat)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_, _ = ask.Write([]byte{askBeat})
			case <-relayed:
				return
			}
		}
	}()
	more := make(chan struct{}, asked+1)
	go func() {
		for {
			select {
			case <-more:
				if _, err := ask.Write([]byte{askFrame}); err != nil {
					return
				}
			case <-relayed:
				return
			}
		}
	}()
	for range asked {
		more <- struct{}{}
	}
	next := func(ctx context.Context) ([]byte, error) {
		select {
		case got, open := <-came:
			if !open {
				return nil, fmt.Errorf("%w: nothing follows", ErrMover)
			}
			if got.err == nil {
				more <- struct{}{} // it has a place: one was taken
			}
			return got.data, got.err
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	first, err := next(ctx)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: it is empty", ErrMover)
		}
		return none, err
	}
	s.begun.Store(true)
	return usual.consume(ctx, e, f.App, f.Command, f.Limit, f.Bytes, &s.bytes, func(ctx context.Context) ([]byte, error) {
		if piece := first; piece != nil {
			first = nil
			return piece, nil
		}
		return next(ctx)
	})
}

// read takes frames off a mover's answer as they come: its hello first. The last has the error, io.EOF at the
// stream's own end.
func read(from *io.PipeReader, came chan<- frame) {
	defer close(came)
	greeting := make([]byte, len(hello))
	if _, err := io.ReadFull(from, greeting); err != nil || string(greeting) != hello {
		if err == nil || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			err = errors.New("it sent no stream")
		}
		came <- frame{err: fmt.Errorf("%w: %w", ErrMover, err)}
		return
	}
	r := NewReader(from)
	for {
		p := make([]byte, maxFrame)
		n, err := io.ReadFull(r, p)
		if n > 0 {
			came <- frame{data: p[:n]}
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, ErrCut):
			err = fmt.Errorf("%w: %w", ErrMover, err)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			err = io.EOF
		}
		came <- frame{err: err}
		return
	}
}

// Serve writes what write gives to a connection that Accept has taken, as it is asked for, and the mark of the end if
// write succeeded.
func Serve(ctx context.Context, conn io.ReadWriteCloser, write func(context.Context, io.Writer) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	s := &served{ctx: ctx, w: NewWriter(conn), more: make(chan struct{}, 2*asked)}
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		buf := make([]byte, 64)
		for {
			n, err := conn.Read(buf)
			for _, b := range buf[:n] {
				if b != askFrame {
					continue
				}
				select {
				case s.more <- struct{}{}:
				default: // it asks for no more than asked at once
				}
			}
			if err != nil {
				stop(gone(err))
				return
			}
		}
	}()
	err := write(ctx, s)
	if err == nil {
		err = s.flush()
	}
	if err == nil {
		err = gone(s.w.End())
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if c, half := conn.(interface{ CloseWrite() error }); half && err == nil {
		// A connection that is closed with something unread is reset.
		if err = c.CloseWrite(); err == nil {
			<-heard
		}
	}
	return err
}

// served collects whole frames, and writes each when it was asked for.
type served struct {
	ctx  context.Context
	w    *Writer
	more chan struct{}
	part []byte
}

func (s *served) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n := min(maxFrame-len(s.part), len(p)-done)
		s.part = append(s.part, p[done:done+n]...)
		done += n
		if len(s.part) == maxFrame {
			if err := s.flush(); err != nil {
				return done, err
			}
		}
	}
	return done, nil
}

func (s *served) flush() error {
	if len(s.part) == 0 {
		return nil
	}
	tick := time.NewTicker(streamBeat)
	defer tick.Stop()
	for {
		select {
		case <-s.more:
			_, err := s.w.Write(s.part)
			s.part = s.part[:0]
			return gone(err)
		case <-tick.C: // a command may take hours for what it has
			if err := s.w.Beat(); err != nil {
				return gone(err)
			}
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		}
	}
}

// gone is the error of a connection to the controller; nil for nil.
func gone(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: the controller is gone: %w", ErrCut, err)
}

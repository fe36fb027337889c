package main

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/repository"
)

// When a command that reads files takes the leases of its recovery points. Whoever gets
// content is held from the start: half a copy is worth nothing. A quick look at names
// writes nothing to the repository; a point that is deleted in its first seconds fails to
// read as it would have a moment later.
const (
	holdAtOnce time.Duration = 0
	holdLate                 = 5 * time.Second
)

// holder has the leases of a command. Not safe for concurrent use.
type holder struct {
	repo    *repository.Repository
	purpose string
	log     *slog.Logger
	late    func() <-chan time.Time // nil for at once

	points map[string]bool // by ID
	ended  chan struct{}
	taking sync.WaitGroup // late

	mu   sync.Mutex // guards held
	held []*backup.Lease
}

// newHolder makes a holder for a command; purpose is shown to whoever meets its leases.
func newHolder(repo *repository.Repository, purpose string, wait time.Duration, log *slog.Logger) *holder {
	h := &holder{repo: repo, purpose: purpose, log: log, points: map[string]bool{}, ended: make(chan struct{})}
	if wait > 0 {
		h.late = func() <-chan time.Time { return time.After(wait) }
	}
	return h
}

// hold sees that a point has a lease. Where none can be had it is read all the same: a
// reader must not depend on writing. Errors: backup.ErrNoSuchPoint for one that was deleted
// meanwhile.
func (h *holder) hold(ctx context.Context, p *backup.Point) error {
	if h.points[p.ID] || !h.repo.Writable() {
		return nil
	}
	h.points[p.ID] = true
	if h.late == nil {
		return h.take(ctx, p)
	}
	late := h.late()
	h.taking.Go(func() {
		select {
		case <-h.ended:
			return
		case <-ctx.Done():
			return
		case <-late:
		}
		if err := h.take(ctx, p); err != nil && ctx.Err() == nil {
			h.warn(p, err)
		}
	})
	return nil
}

func (h *holder) take(ctx context.Context, p *backup.Point) error {
	l, err := backup.AcquireLease(ctx, h.repo, p, h.purpose)
	switch {
	case err == nil:
		h.mu.Lock()
		defer h.mu.Unlock()
		h.held = append(h.held, l)
	case errors.Is(err, backup.ErrNoSuchPoint), ctx.Err() != nil:
		return err
	default:
		h.warn(p, err)
	}
	return nil
}

func (h *holder) warn(p *backup.Point, err error) {
	h.log.Warn("the recovery point could be pruned while it is read", "point", p.Name(), "error", err)
}

// release gives all leases back.
func (h *holder) release(ctx context.Context) {
	close(h.ended)
	h.taking.Wait()
	for _, l := range h.held {
		if err := l.Close(ctx); err != nil {
			h.log.Warn("cannot give a lease back; it runs out by itself", "error", err)
		}
	}
}

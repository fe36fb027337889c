package serve

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
)

// siblings are the other points of a volume, as bases to compare with.
type siblings struct {
	c        *Catalog
	id, name string // of the point itself

	mu     sync.Mutex
	images map[string]*image.Image // by ID
	held   map[string]heldBase     // by ID: those that clients have selected
}

// heldBase is a point that a client compares with, and its lease; nil where none could
// be had.
type heldBase struct {
	point *backup.Point
	lease *backup.Lease
}

func (s *siblings) names() []string { return s.c.current.Load().siblings(s.id) }

func (s *siblings) find(name string) (*backup.Point, bool) {
	s.mu.Lock()
	h, ok := s.held[name]
	s.mu.Unlock()
	if ok {
		return h.point, true // also if it was deleted by force
	}
	l := s.c.current.Load()
	own, ok := l.byID[s.id]
	i, found := l.resolve(name)
	if !ok || !found || name == "" || i == own || l.points[i].Volume != l.points[own].Volume {
		return nil, false
	}
	return l.points[i], true
}

func (s *siblings) open(ctx context.Context, p *backup.Point) (*image.Image, error) {
	s.mu.Lock()
	img := s.images[p.ID]
	s.mu.Unlock()
	if img != nil {
		return img, nil
	}
	img, err := s.c.openImage(ctx, p)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.images == nil {
		s.images = map[string]*image.Image{}
	}
	s.images[p.ID] = img
	return img, nil
}

// hold takes leases on the points that a client compares the disk with: what it has
// selected must not go while it asks.
func (s *siblings) hold(ctx context.Context, contexts []string) error {
	for _, name := range contexts {
		base, dirty := strings.CutPrefix(name, contextDirty)
		if !dirty {
			continue
		}
		p, ok := s.find(base)
		if !ok {
			return s.gone(base)
		}
		if err := s.holdPoint(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

func (s *siblings) gone(base string) error {
	return fmt.Errorf("%s: %w: %s, to compare with, was deleted", s.name, backup.ErrNoSuchPoint, base)
}

func (s *siblings) holdPoint(ctx context.Context, p *backup.Point) error {
	s.mu.Lock()
	_, ok := s.held[p.ID]
	s.mu.Unlock()
	if ok {
		return nil
	}
	lease, err := s.c.lease(ctx, p, p.Name())
	if err != nil {
		return s.gone(p.Name())
	}
	s.mu.Lock()
	if _, ok := s.held[p.ID]; ok { // another client was faster
		s.mu.Unlock()
		if lease != nil {
			_ = lease.Close(ctx) // it would run out by itself
		}
		return nil
	}
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = map[string]heldBase{}
	}
	s.held[p.ID] = heldBase{p, lease}
	return nil
}

// release gives the leases back.
func (s *siblings) release(ctx context.Context) error {
	s.mu.Lock()
	held := s.held
	s.held = nil
	s.mu.Unlock()
	var err error
	for _, h := range held {
		if h.lease != nil {
			err = errors.Join(err, h.lease.Close(ctx))
		}
	}
	return err
}

// inTime bounds what opening a point takes.
func (c *Catalog) inTime(ctx context.Context) (context.Context, context.CancelFunc) {
	if c.opt.ReadTimeout <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, c.opt.ReadTimeout)
}

// lease takes the lease of a point. Where none can be had, it is nil and the log says so:
// a reader must not depend on writing. The only error is backup.ErrNoSuchPoint.
func (c *Catalog) lease(ctx context.Context, p *backup.Point, name string) (*backup.Lease, error) {
	if !c.repo.Writable() {
		return nil, nil //nolint:nilnil // there is none, and that is no error
	}
	ctx, cancel := c.inTime(context.WithoutCancel(ctx))
	defer cancel()
	lease, err := backup.AcquireLease(ctx, c.repo, p, "serve")
	switch {
	case errors.Is(err, backup.ErrNoSuchPoint):
		return nil, err
	case err != nil && !errors.Is(err, repository.ErrReadOnly):
		c.calls.WarnContext(ctx, "no lease: prune elsewhere may delete this point while it is read", "export", name, "err", err)
	}
	return lease, nil
}

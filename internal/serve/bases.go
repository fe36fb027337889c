package serve

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
)

// siblings are the other points of a volume, as bases with which one connection compares its
// disk.
type siblings struct {
	c        *Catalog
	id, name string // of the point itself

	mu   sync.Mutex
	held map[string]*disks.Disk // selected by the client, by ID
}

func (s *siblings) names() []string { return s.c.current.Load().siblings(s.id) }

func (s *siblings) find(name string) (*points.Point, bool) {
	if d := s.get(name); d != nil {
		return d.Point(), true // even if it was deleted by force
	}
	l := s.c.current.Load()
	own, ok := l.byID[s.id]
	i, found := l.resolve(name)
	if !ok || !found || name == "" || i == own || l.points[i].Volume != l.points[own].Volume {
		return nil, false
	}
	return l.points[i], true
}

func (s *siblings) get(id string) *disks.Disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held[id]
}

func (s *siblings) open(ctx context.Context, p *points.Point) (*image.Image, error) {
	d, err := s.holdPoint(ctx, p)
	if err != nil {
		return nil, err
	}
	return d.Image(), nil
}

// hold takes leases on the points with which a client compares the disk: what it has selected
// must not be deleted while it asks.
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
		d, err := s.holdPoint(ctx, p)
		if err == nil {
			err = d.Lease(context.WithoutCancel(ctx))
		}
		if errors.Is(err, points.ErrNoSuchPoint) {
			return s.gone(p.Name())
		}
		if err != nil {
			return fmt.Errorf("%s: open %s, to compare with: %w", s.name, p.Name(), err)
		}
	}
	return nil
}

func (s *siblings) gone(base string) error {
	return fmt.Errorf("%s: %w: %s, to compare with, was deleted", s.name, points.ErrNoSuchPoint, base)
}

func (s *siblings) holdPoint(ctx context.Context, p *points.Point) (*disks.Disk, error) {
	if d := s.get(p.ID); d != nil {
		return d, nil
	}
	d, err := s.c.disks.Hold(ctx, p)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.held[p.ID]; other != nil { // another request was first
		d.Release()
		return other, nil
	}
	if s.held == nil {
		s.held = map[string]*disks.Disk{}
	}
	s.held[p.ID] = d
	return d, nil
}

// release releases the bases.
func (s *siblings) release() {
	s.mu.Lock()
	held := s.held
	s.held = nil
	s.mu.Unlock()
	for _, d := range held {
		d.Release()
	}
}

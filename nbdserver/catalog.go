package nbdserver

import (
	"context"
	"slices"
	"sync"
)

// Static is a Catalog held in memory. The empty name opens the only export
// when there is just one. Exports may be added and removed while it serves:
// connections keep what they have opened.
type Static struct {
	mu      sync.RWMutex
	exports map[string]Opened
	names   []string // sorted
}

// NewStatic makes a catalogue of the given exports; Name is required unless
// there is just one.
func NewStatic(exports ...Opened) *Static {
	s := &Static{exports: map[string]Opened{}}
	for _, e := range exports {
		s.Add(e)
	}
	return s
}

// Add adds an export, replacing one of the same name.
func (s *Static) Add(e Opened) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.exports[e.Name]; !ok {
		i, _ := slices.BinarySearch(s.names, e.Name)
		s.names = slices.Insert(s.names, i, e.Name)
	}
	s.exports[e.Name] = e
}

// Remove removes an export; new connections to it are refused.
func (s *Static) Remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, ok := slices.BinarySearch(s.names, name); ok {
		s.names = slices.Delete(s.names, i, i+1)
		delete(s.exports, name)
	}
}

// List reports the exports in the order of their names.
func (s *Static) List(_ context.Context, _ Client, yield func(Listing) bool) error {
	s.mu.RLock()
	names := slices.Clone(s.names)
	s.mu.RUnlock()
	for _, n := range names {
		s.mu.RLock()
		e, ok := s.exports[n]
		s.mu.RUnlock()
		if ok && !yield(Listing{Name: e.Name, Description: e.Description}) {
			break
		}
	}
	return nil
}

// Resolve maps the empty name to the only export.
func (s *Static) Resolve(_ context.Context, name string, _ Client) (string, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if _, ok := s.exports[name]; ok {
		return name, nil
	}
	if name == "" && len(s.names) == 1 {
		return s.names[0], nil
	}
	return "", ErrUnknownExport
}

// Open returns the export of that name.
func (s *Static) Open(ctx context.Context, name string, client Client) (*Opened, error) {
	name, err := s.Resolve(ctx, name, client)
	if err != nil {
		return nil, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	e, ok := s.exports[name]
	if !ok {
		return nil, ErrUnknownExport
	}
	return &e, nil
}

var _ Resolver = (*Static)(nil)

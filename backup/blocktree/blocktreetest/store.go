// Package blocktreetest keeps block trees in memory for tests: a store that
// counts, holds up and loses objects, and a model of a disk to check against.
package blocktreetest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"sync"

	"github.com/varve-io/varve/backup/repository"
)

// Store is a repository in memory. The zero value is empty and ready; all
// methods are safe for concurrent use.
type Store struct {
	// Before, if set, is called before every read. An error fails the read.
	Before func(ctx context.Context, oid repository.ObjectID) error

	mu      sync.Mutex
	objects map[repository.ObjectID][]byte
	reads   map[repository.ObjectID]int
	written map[byte]int64 // bytes by prefix, each content once
}

// WriteBlock stores p as a direct object.
func (s *Store) WriteBlock(_ context.Context, p []byte) (repository.ObjectID, error) {
	return s.write('b', p), nil
}

// WriteIndex stores p as a direct object among the metadata.
func (s *Store) WriteIndex(_ context.Context, p []byte) (repository.ObjectID, error) {
	return s.write('x', p), nil
}

// id is the content's hash under its prefix, as Kopia names contents.
func id(prefix byte, p []byte) repository.ObjectID {
	sum := sha256.Sum256(p)
	text := hex.EncodeToString(sum[:16])
	if prefix == 'x' {
		text = "x" + text
	}
	oid, err := repository.ParseObjectID(text)
	if err != nil {
		panic(err)
	}
	return oid
}

func (s *Store) write(prefix byte, p []byte) repository.ObjectID {
	oid := id(prefix, p)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.objects == nil {
		s.objects = map[repository.ObjectID][]byte{}
		s.reads = map[repository.ObjectID]int{}
		s.written = map[byte]int64{}
	}
	if _, ok := s.objects[oid]; !ok {
		s.objects[oid] = append([]byte(nil), p...)
		s.written[prefix] += int64(len(p))
	}
	return oid
}

// ReadObject returns a copy of a direct object.
func (s *Store) ReadObject(ctx context.Context, oid repository.ObjectID) ([]byte, error) {
	if s.Before != nil {
		if err := s.Before(ctx, oid); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.objects[oid]
	if !ok {
		return nil, fmt.Errorf("object %v: %w", oid, repository.ErrContentMissing)
	}
	s.reads[oid]++
	return append([]byte(nil), p...), nil
}

// ZeroID returns the ID of n zero bytes.
func (s *Store) ZeroID(_ context.Context, n int64) (repository.ObjectID, error) {
	return id('b', make([]byte, n)), nil
}

// Lose removes an object, as if its pack were gone.
func (s *Store) Lose(oid repository.ObjectID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, oid)
}

// Replace changes the bytes of an object under its ID.
func (s *Store) Replace(oid repository.ObjectID, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[oid] = p
}

// Reads returns how often oid was read.
func (s *Store) Reads(oid repository.ObjectID) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reads[oid]
}

// TotalReads returns how many objects were read, again ones included.
func (s *Store) TotalReads() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.reads {
		n += c
	}
	return n
}

// IndexBytes returns how many bytes of distinct indexes were written.
func (s *Store) IndexBytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written['x']
}

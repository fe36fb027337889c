package csi

import (
	"context"
	"fmt"
	"sync"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"
	"google.golang.org/grpc"

	"github.com/varve-io/varve/backup/cbt"
)

// Names of the sources, as recovery points record them.
const (
	DeltaName     = "csi-delta"
	AllocatedName = "csi-allocated"
	WholeName     = "compare"
)

// Session is one backup's conversation with a driver's sidecar, over one connection.
type Session struct {
	opt      Options
	conn     *grpc.ClientConn // nil if the driver has no usable service
	client   api.SnapshotMetadataClient
	broken   error     // why it cannot be used
	troubles *troubles // of conn

	mu    sync.Mutex
	stats Stats
}

// Stats counts a Session's calls.
type Stats struct {
	Calls    int64 `json:"calls"`    // made, answered or not
	Messages int64 `json:"messages"` // received
	Ranges   int64 `json:"ranges"`   // in those messages
	Breaks   int64 `json:"breaks"`   // calls that ended with an error and were continued
	// EarlyEnds are clean ends of a stream before the end of the list.
	EarlyEnds int64 `json:"earlyEnds"`
}

// Open checks the options and prepares the connection, which the first call makes: if the
// service cannot be reached, or its object in the cluster is wrong, the sources fail with a
// reason to fall back. Errors of Open are mistakes of the caller. Close the Session.
func Open(_ context.Context, opt Options) (*Session, error) {
	opt, err := opt.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("changed blocks by CSI: %w", err)
	}

	s := &Session{opt: opt}
	if s.broken = opt.Endpoint.check(); s.broken == nil && opt.Endpoint.Address != "" {
		s.broken = s.reconnect()
	}
	return s, nil
}

// reconnect replaces the connection. A failed one waits, by its own clock, before it retries;
// how long to wait is for Retry to decide.
func (s *Session) reconnect() error {
	troubles := &troubles{}

	conn, err := connect(s.opt, troubles)
	if err != nil {
		return err
	}

	if s.conn != nil {
		_ = s.conn.Close()
	}

	s.conn, s.client, s.troubles = conn, api.NewSnapshotMetadataClient(conn), troubles
	return nil
}

// Close ends the connection.
func (s *Session) Close() error {
	if s.conn == nil {
		return nil
	}
	return s.conn.Close()
}

// Stats of the calls so far.
func (s *Session) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

func (s *Session) count(f func(*Stats)) {
	s.mu.Lock()
	defer s.mu.Unlock()

	f(&s.stats)
}

// Ladder returns the sources for backup.Options: Source, and Fallback.
func (s *Session) Ladder() (first cbt.Source, fallback []cbt.Source) {
	return s.Delta(), []cbt.Source{s.Allocated(), s.Whole()}
}

// Delta lists what changed since the request's base. Its change ID must be known, its volume
// the target's, and the snapshot kept as the base, if any, the one it names. Without a base
// it fails with cbt.ErrNoBase.
func (s *Session) Delta() cbt.Source { return delta{s} }

// Allocated lists what holds data in the target, whatever the base: all else reads as zeroes.
func (s *Session) Allocated() cbt.Source { return allocated{s} }

// Whole is cbt.Compare that records which snapshot was read, so that the next increment can
// be a delta.
func (s *Session) Whole() cbt.Source { return whole{s} }

// Unchanged asks whether nothing changed since base, before a volume is made of the snapshot,
// and stops at the first range. Its errors are those of Delta's Changes.
//
// An empty list has no capacity: the caller must know otherwise that the volume has not grown
// (the content's restoreSize). And nothing is spot-checked without a disk, so a driver that
// never reports a change is found only if such backups are sometimes made with the disk.
func (s *Session) Unchanged(ctx context.Context, base cbt.Base) (bool, error) {
	found := false
	// There is no device to compare the capacity with.
	_, err := s.listDelta(ctx, cbt.Request{Base: &base, Size: anySize}, func(cbt.Extent) error {
		found = true
		return errEnough
	})

	if found {
		return false, nil
	}
	return err == nil, err
}

package csi_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/cbt/csi/csitest"
)

const stallTimeout = 15 * time.Minute

// testClock ends every wait at once, and stalls only on request.
type testClock struct {
	mu     sync.Mutex
	waits  []time.Duration
	stalls []*stallTimer
}

type stallTimer struct {
	c *testClock
	f func()
}

func (c *testClock) AfterFunc(d time.Duration, f func()) csi.Timer {
	c.mu.Lock()
	defer c.mu.Unlock()

	if d == stallTimeout {
		timer := &stallTimer{c, f}
		c.stalls = append(c.stalls, timer)
		return timer
	}

	c.waits = append(c.waits, d)
	go f()
	return time.NewTimer(0)
}

func (s *stallTimer) Reset(time.Duration) bool { return true }

func (s *stallTimer) Stop() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()

	s.f = nil
	return true
}

// stall makes every current call reach its stall timeout.
func (c *testClock) stall() {
	c.mu.Lock()
	defer c.mu.Unlock()

	for _, s := range c.stalls {
		if s.f != nil {
			s.f()
		}
	}
}

func (c *testClock) waited() []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]time.Duration(nil), c.waits...)
}

type fixedToken string

func (f fixedToken) Token(t context.Context) (csi.Token, error) { return csi.NewToken(string(f)) }

// openSession opens a session with a server, for volume vol from snapshot base to snapshot
// target, with options changed by change.
func openSession(t *testing.T, s *csitest.Server, change func(*csi.Options)) *csi.Session {
	t.Helper()

	opt := csi.Options{
		Endpoint: s.Endpoint(), Tokens: fixedToken(csitest.Token), StallTimeout: stallTimeout, Clock: &testClock{},
		Target: csi.Snapshot{Namespace: "ns", Name: "snap", Handle: "target", ChangeID: "target", VolumeHandle: "vol"},
		Base:   &csi.Snapshot{Handle: "base", ChangeID: "base"},
	}
	if change != nil {
		change(&opt)
	}

	session, err := csi.Open(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { _ = session.Close() })
	return session
}

// newSource returns the source of a session with a server that reports l.
func newSource(t *testing.T, l cbttest.Listing) cbt.Source {
	t.Helper()

	script := csitest.Script{Capacity: l.Size, Delta: l.Extents, Allocated: l.Extents, Fixed: l.Fixed, PerMessage: 3}

	for i, b := range l.Breaks {
		behaviour := csitest.Behaviour{End: csitest.Status, Code: codes.Unavailable, After: b.After, Before: b.Before, Repeat: b.Repeat}

		switch {
		case b.Early:
			behaviour.End = csitest.Early
		case i%2 == 1:
			behaviour.End = csitest.Drop
		}

		script.Calls = append(script.Calls, behaviour)
	}

	if l.CutAfter >= 0 {
		script.Then = csitest.Behaviour{End: csitest.Status, Code: codes.Unavailable, After: l.CutAfter}
	}

	session := openSession(t, csitest.New(t, script), func(o *csi.Options) {
		o.Target.ChangeID, o.Target.VolumeHandle = l.Target, l.Volume
		o.Base = &csi.Snapshot{Handle: l.Base, ChangeID: l.Base}
	})
	if l.Base == "" {
		return session.Allocated()
	}
	return session.Delta()
}

func TestConforms(t *testing.T) {
	cbttest.All(t, map[string]string{
		"ZeroExtents": "the protocol has no word for zeroes",
		"Unsorted":    "the protocol has offsets increase; what does not is refused, see Duplicated",
	}, newSource)
}

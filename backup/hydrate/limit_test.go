package hydrate

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// At the limit, copies that are not in use are evicted; then nothing more is kept, one line
// says so, and all is read.
func TestLimit(t *testing.T) {
	a, b := newImage(30*unit), newImage(30*unit)
	need := int64(20 * unit)
	c, log := openCache(t, Options{Keep: true, Limit: need * 3 / 2, Retry: time.Millisecond})
	first := c.mustOpen(t, a, "a")
	same(t, first, a.data)
	held := first.held.Load()
	second := c.mustOpen(t, b, "b")
	second.Start()
	same(t, second, b.data)
	until(t, "the limit is told", func() bool { return log.count("reached its limit") == 1 })
	second.tasks.Wait() // its hydration, which finds no room; beside a reader it may be about to keep what that has read
	if st := c.Stats(); st.Bytes > st.Limit || first.held.Load() != held || second.Complete() {
		t.Errorf("%+v", st)
	}
	closed(t, first)
	c.Retain(func(id string) bool { return id != "x" })
	third := c.mustOpen(t, newImage(5*unit), "c")
	same(t, second, b.data) // takes the space of a
	if !second.Complete() {
		t.Errorf("%d of %d bytes, although a copy could go: %+v", second.Known(), b.Size(), c.Stats())
	}
	if _, err := os.Stat(filepath.Join(c.opt.Dir, "a")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the copy that went: %v", err)
	}
	closed(t, second)
	closed(t, third)
	c.Retain(func(id string) bool { return id == "c" })
	if _, err := os.Stat(filepath.Join(c.opt.Dir, "b")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a copy of an image that is gone: %v", err)
	}
	if st := c.Stats(); st.Bytes != third.held.Load() {
		t.Errorf("%+v, not %d", st, third.held.Load())
	}
}

// Kept copies survive a restart with a limit by free space; a smaller limit evicts the least
// recently used.
func TestLimitAtStart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	src := newImage(20 * unit)
	old := time.Now().Add(-time.Hour)
	for _, id := range []string{"old", "new"} {
		c, _ := openCache(t, Options{Dir: dir, Keep: true, FreeShare: 0.9})
		d := c.mustOpen(t, src, id)
		same(t, d, src.data)
		closed(t, d)
		if err := errors.Join(c.Close(), os.Chtimes(filepath.Join(dir, "old", "data"), old, old)); err != nil {
			t.Fatal(err)
		}
	}
	there := func() (ids []string) {
		for _, id := range []string{"old", "new"} {
			if _, err := os.Stat(filepath.Join(dir, id, "data")); err == nil {
				ids = append(ids, id)
			}
		}
		return ids
	}
	c, _ := openCache(t, Options{Dir: dir, Keep: true, FreeShare: 0.9})
	if got := there(); len(got) != 2 {
		t.Errorf("after a restart there are copies of %v", got)
	}
	taken := c.Stats().Bytes
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	openCache(t, Options{Dir: dir, Keep: true, Limit: taken * 3 / 4})
	if got := there(); !slices.Equal(got, []string{"new"}) {
		t.Errorf("under a smaller limit there are copies of %v", got)
	}
}

// Many who take space at once evict a copy once, and all that fits afterwards is taken.
func TestReserveConcurrently(t *testing.T) {
	const takers = 8
	for range 300 {
		c, log := openCache(t, Options{Limit: takers + 1})
		c.used.Store(takers + 1)
		c.idle["old"] = idleCopy{bytes: takers + 1}
		var all sync.WaitGroup
		for range takers {
			all.Go(func() {
				if !c.reserve(1) {
					t.Error("there is room, and none is found")
				}
			})
		}
		all.Wait()
		if n := c.used.Load(); n != takers || log.count("reached its limit") > 0 {
			t.Errorf("%d of %d are taken, and the limit is told %d times", n, takers, log.count("reached its limit"))
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
}

// A write that found the disk full while another made room is no reason to keep nothing more.
func TestOutOfSpaceConcurrently(t *testing.T) {
	c, log := openCache(t, Options{})
	c.idle["old"] = idleCopy{bytes: 1}
	before := c.removed.Load()
	c.outOfSpace(syscall.ENOSPC, before)
	c.outOfSpace(syscall.ENOSPC, before)
	if c.noSpace.Load() || log.count("no space left for") > 0 {
		t.Error("nothing more is kept although a copy was removed since")
	}
	c.outOfSpace(syscall.ENOSPC, c.removed.Load())
	if !c.noSpace.Load() || log.count("no space left for") != 1 {
		t.Error("a full disk is not noticed")
	}
}

package imageio_test

import (
	"bytes"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/imageio"
	"github.com/varve-io/varve/backup/imageio/imageiotest"
)

var _ backup.RestoreTarget = (*imageio.Target)(nil)

// restore writes a disk as a restore does: blocks in several goroutines, zeroes as such.
func restore(t *testing.T, target *imageio.Target, disk []byte) error {
	t.Helper()
	const block = 64 << 10
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed error
	next := make(chan int)
	for range 4 {
		wg.Go(func() {
			for off := range next {
				p := disk[off:min(off+block, len(disk))]
				var err error
				if len(bytes.Trim(p, "\x00")) == 0 {
					err = target.ZeroRange(int64(off), int64(len(p)))
				} else {
					_, err = target.WriteAt(p, int64(off))
				}
				mu.Lock()
				failed = errors.Join(failed, err)
				mu.Unlock()
			}
		})
	}
	for off := 0; off < len(disk); off += block {
		next <- off
	}
	close(next)
	wg.Wait()
	return errors.Join(failed, target.Sync())
}

// TestTarget restores to services of each kind. What was written must be durable: the service
// loses the rest at the end.
func TestTarget(t *testing.T) {
	t.Parallel()
	disk, old := sparse(6<<20+511), sparse(6<<20+511)
	for i := range old[:1<<20] {
		old[i] = 7
	}
	clear(disk[256<<10 : 512<<10]) // whole blocks of zeroes over data
	clear(disk[2<<20 : 3<<20])
	var mu sync.Mutex
	failures := 0
	fail := func(when func(n int) bool, how func(s *imageiotest.Server, w http.ResponseWriter, r *http.Request)) func(*imageiotest.Server, http.ResponseWriter, *http.Request, int) bool {
		return func(s *imageiotest.Server, w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Method != http.MethodPut && r.Method != http.MethodPatch || !when(n) {
				return false
			}
			mu.Lock()
			failures++
			mu.Unlock()
			how(s, w, r)
			return true
		}
	}
	forget := func(s *imageiotest.Server, w http.ResponseWriter, _ *http.Request) {
		s.Lose()
		imageiotest.Fail(w, http.StatusInternalServerError, "Internal server error")
	}
	for name, c := range map[string]struct {
		cfg imageiotest.Config
		new bool
	}{
		"of today":      {imageiotest.Config{}, false},
		"fresh":         {imageiotest.Config{}, true},
		"unix socket":   {imageiotest.Config{UnixSocket: true}, false},
		"no flush":      {imageiotest.Config{Features: []string{"extents", "zero"}}, false},
		"nothing":       {imageiotest.Config{Features: []string{}}, false},
		"forgets":       {imageiotest.Config{Hook: fail(func(n int) bool { return n == 30 || n == 61 }, forget)}, false},
		"forgets often": {imageiotest.Config{Hook: fail(func(n int) bool { return n < 200 && n%50 == 0 }, forget)}, false},
		// More often than all that is kept can be sent: it goes in smaller pieces.
		"forgets all the time": {imageiotest.Config{Hook: fail(func(n int) bool { return n > 20 && n%3 == 0 }, forget)}, false},
		"cuts": {imageiotest.Config{Hook: fail(func(n int) bool { return n == 20 || n == 55 || n == 130 }, func(s *imageiotest.Server, w http.ResponseWriter, _ *http.Request) {
			s.Lose()
			imageiotest.Cut(w, http.StatusOK, nil, 10, 3)
		})}, false},
		"no flush, fails": {imageiotest.Config{Features: []string{"zero"}, Hook: fail(func(n int) bool { return n%20 == 9 }, forget)}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c.cfg.Disk = old
			if c.new {
				c.cfg.Disk = make([]byte, len(disk))
			}
			s := imageiotest.Start(t, c.cfg)
			target, err := imageio.NewTarget(t.Context(), transfer(t, s), int64(len(disk)), imageio.Options{CA: s.CA, Retry: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			defer target.Close()
			if target.Fresh() != c.new {
				t.Errorf("fresh: %v", target.Fresh())
			}
			if err := restore(t, target, disk); err != nil {
				t.Fatal(err)
			}
			back := make([]byte, len(disk))
			if _, err := target.ReadAt(back, 0); err != nil || !bytes.Equal(back, disk) {
				t.Errorf("reads back as another disk, or %v", err)
			}
			s.Lose()
			if !bytes.Equal(s.Disk(), disk) {
				t.Error("what was written is lost without a power cut")
			}
			if seen := s.Seen(); c.new && seen.ZeroBytes > 0 {
				t.Errorf("%d bytes of a fresh disk were zeroed", seen.ZeroBytes)
			}
		})
	}
	t.Cleanup(func() {
		if failures < 8 {
			t.Errorf("only %d requests failed", failures)
		}
	})
}

// TestTargetZeroes zeroes again what was written since, and leaves out what was zero.
func TestTargetZeroes(t *testing.T) {
	t.Parallel()
	s := imageiotest.Start(t, imageiotest.Config{Disk: make([]byte, 8<<20)})
	s.Write(6<<20, []byte("old"))
	target, err := imageio.NewTarget(t.Context(), transfer(t, s), 8<<20, imageio.Options{CA: s.CA})
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	if _, err := target.WriteAt([]byte("new"), 3<<20+1000); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(target.ZeroRange(0, 8<<20), target.Sync()); err != nil {
		t.Fatal(err)
	}
	if got := s.Durable(); len(bytes.Trim(got, "\x00")) > 0 {
		t.Error("not all reads as zeroes")
	}
	if n := s.Seen().ZeroBytes; n > 2<<20 {
		t.Errorf("%d bytes were zeroed for two that were not", n)
	}
}

// TestTargetBounded flushes by itself, so that what is kept has a bound.
func TestTargetBounded(t *testing.T) {
	t.Parallel()
	s := imageiotest.Start(t, imageiotest.Config{Disk: make([]byte, 8<<20)})
	target, err := imageio.NewTarget(t.Context(), transfer(t, s), 8<<20, imageio.Options{CA: s.CA})
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	p := bytes.Repeat([]byte("x"), 8<<20)
	for range 17 {
		if _, err := target.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.Seen().Flushes; n != 2 {
		t.Errorf("%d flushes of 136 MiB", n)
	}
}

// TestTargetHopeless has a service that takes no write from some time on: the restore ends, and says
// how often it tried.
func TestTargetHopeless(t *testing.T) {
	t.Parallel()
	s := imageiotest.Start(t, imageiotest.Config{Disk: make([]byte, 8<<20), Hook: func(s *imageiotest.Server, w http.ResponseWriter, r *http.Request, n int) bool {
		if r.Method != http.MethodPut || n < 40 {
			return false
		}
		s.Lose()
		imageiotest.Fail(w, http.StatusInternalServerError, "Internal server error")
		return true
	}})
	target, err := imageio.NewTarget(t.Context(), transfer(t, s), 8<<20, imageio.Options{CA: s.CA, Retry: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	err = restore(t, target, bytes.Repeat([]byte("x"), 8<<20))
	var status *imageio.StatusError
	if !errors.As(err, &status) || !strings.Contains(err.Error(), "times in a row") || !strings.Contains(err.Error(), "run the same restore again") {
		t.Errorf("a service that takes nothing: %v", err)
	}
}

func TestTargetRefused(t *testing.T) {
	t.Parallel()
	ended := false
	var mu sync.Mutex
	s := imageiotest.Start(t, imageiotest.Config{Disk: make([]byte, 1<<20), Hook: func(_ *imageiotest.Server, w http.ResponseWriter, _ *http.Request, _ int) bool {
		mu.Lock()
		defer mu.Unlock()
		if ended {
			imageiotest.Fail(w, http.StatusForbidden, "No such ticket "+imageiotest.Ticket)
		}
		return ended
	}})
	opt := imageio.Options{CA: s.CA, Retry: time.Minute}
	if _, err := imageio.NewTarget(t.Context(), transfer(t, s), 1<<20+1, opt); !errors.Is(err, imageio.ErrTooSmall) {
		t.Errorf("too small: %v", err)
	}
	target, err := imageio.NewTarget(t.Context(), transfer(t, s), 1<<20, opt)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	if _, err := target.WriteAt([]byte("xx"), 1<<20-1); err == nil {
		t.Error("written beyond the end")
	}
	if _, err := target.WriteAt([]byte("xx"), 0); err != nil {
		t.Error(err)
	}
	mu.Lock()
	ended = true
	mu.Unlock()
	for _, err := range []error{target.ZeroRange(0, 4096), target.Sync()} {
		if err != nil && (!errors.Is(err, imageio.ErrDenied) || strings.Contains(err.Error(), imageiotest.Ticket)) {
			t.Errorf("the transfer ended: %v", err)
		}
	}
	if err := target.Sync(); err == nil {
		t.Error("a flush after the end of the transfer")
	}
	down := imageiotest.Start(t, imageiotest.Config{Disk: make([]byte, 1<<20), ReadOnly: true})
	if _, err := imageio.NewTarget(t.Context(), transfer(t, down), 1<<20, imageio.Options{CA: down.CA}); !errors.Is(err, imageio.ErrReadOnly) {
		t.Errorf("a download: %v", err)
	}
}

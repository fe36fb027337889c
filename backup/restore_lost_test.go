package backup

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
)

const lossyBlock = 1 << 20

// lossyTarget is a target in memory that fails, and then has only what it had at its last good
// sync. Blocks never written hold old bytes.
type lossyTarget struct {
	device bool
	size   int64

	mu        sync.Mutex
	syncs     int
	failSync  int // which sync fails, from 1; 0 for none
	armed     bool
	failWrite bool // once, when armed
	failZero  bool
	blocks    map[int64][]byte // nil for zeroes
	synced    map[int64][]byte
}

func newLossyTarget(size int64) *lossyTarget {
	return &lossyTarget{size: size, blocks: map[int64][]byte{}}
}

// lose drops what was written since the last good sync.
func (l *lossyTarget) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop()
}

func (l *lossyTarget) drop() {
	l.blocks = maps.Clone(l.synced)
	if l.blocks == nil {
		l.blocks = map[int64][]byte{}
	}
}

// put writes one piece, of whole blocks except at the end; nil is zeroes.
func (l *lossyTarget) put(off, n int64, p []byte, fail *bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if *fail && l.armed {
		*fail = false
		l.drop()
		return syscall.EIO
	}
	if off%lossyBlock != 0 || n%lossyBlock != 0 && off+n != l.size {
		return errors.New("a part of a block")
	}
	for at := int64(0); at < n; at += lossyBlock {
		l.blocks[(off+at)/lossyBlock] = nil
		if p != nil {
			l.blocks[(off+at)/lossyBlock] = bytes.Clone(p[at:min(at+lossyBlock, n)])
		}
	}
	return nil
}

func (l *lossyTarget) WriteAt(p []byte, off int64) (int, error) {
	if err := l.put(off, int64(len(p)), p, &l.failWrite); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (l *lossyTarget) ZeroRange(off, length int64) error {
	return l.put(off, length, nil, &l.failZero)
}

func (l *lossyTarget) ReadAt(p []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for n := range p {
		at := off + int64(n)
		block, written := l.blocks[at/lossyBlock]
		switch {
		case !written:
			p[n] = 0xa5
		case block == nil:
			p[n] = 0
		default:
			p[n] = block[at%lossyBlock]
		}
	}
	return len(p), nil
}

func (l *lossyTarget) Sync() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.syncs++
	if l.syncs == l.failSync {
		l.drop()
		return syscall.EIO
	}
	l.synced = maps.Clone(l.blocks)
	return nil
}

// arm has the target fail if a sync failed or journal lists something as safe.
func (l *lossyTarget) arm(journal string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, err := os.ReadFile(journal)
	l.armed = err == nil && bytes.Contains(b, []byte("\ns ")) || l.syncs > 0 && l.syncs == l.failSync
	return l.armed
}

func (l *lossyTarget) Fit() error       { return nil }
func (l *lossyTarget) Empty() error     { return nil }
func (l *lossyTarget) Fresh() bool      { return false }
func (l *lossyTarget) Device() bool     { return l.device }
func (l *lossyTarget) Direct() bool     { return true }
func (l *lossyTarget) Size() int64      { return l.size }
func (l *lossyTarget) Path() string     { return "lossy" }
func (l *lossyTarget) Identity() string { return "lossy" }

// check compares all bytes.
func (l *lossyTarget) check(t *testing.T, want []byte) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	zeroes := make([]byte, lossyBlock)
	for off := int64(0); off < l.size; off += lossyBlock {
		mine := want[off:min(off+lossyBlock, l.size)]
		block, written := l.blocks[off/lossyBlock]
		if written && block == nil {
			block = zeroes[:len(mine)]
		}
		if !bytes.Equal(block, mine) {
			t.Fatalf("block at %d MiB differs (written: %v)", off>>20, written)
		}
	}
}

// run restores, up to stop bytes if that is not 0. At waitAt it waits for a
// sync, for which a busy disk may need minutes.
func (l *lossyTarget) run(t *testing.T, try func(context.Context, RestoreOptions) (RestoreResult, error), journal string, waitAt, stop int64) (RestoreResult, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	return try(ctx, RestoreOptions{Journal: journal, Workers: 1, Progress: func(p Progress) {
		for waitAt > 0 && p.Done >= waitAt && !l.arm(journal) && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		if stop > 0 && p.Done >= stop {
			cancel()
		}
	}})
}

// TestRestoreAfterLoss: what a target has lost, after an error or with its power, is written
// again by the next run, and what a sync has covered is not.
func TestRestoreAfterLoss(t *testing.T) {
	r, _ := newRepo(t)
	// Mostly holes, of which a target in memory can have many.
	data := make([]byte, 500<<20+5000)
	rng := rand.New(rand.NewPCG(7, 7))
	for off := 3 << 20; off < len(data); off += 16 << 20 {
		copy(data[off:], randomBytes(rng, lossyBlock))
	}
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}, BlockSize: lossyBlock})
	try := func(target RestoreTarget) func(context.Context, RestoreOptions) (RestoreResult, error) {
		return func(ctx context.Context, opt RestoreOptions) (RestoreResult, error) {
			return Restore(ctx, r, p, target, opt)
		}
	}
	const wait, stop = 400 << 20, 450 << 20 // one sync is due before the last, at 256 MiB
	for name, c := range map[string]struct {
		set    func(*lossyTarget)
		waitAt int64
		stop   int64
		want   error
		none   bool // nothing was synced
	}{
		"last sync":       {func(l *lossyTarget) { l.failSync = 2 }, wait, 0, syscall.EIO, false},
		"background sync": {func(l *lossyTarget) { l.failSync = 1 }, wait, 0, syscall.EIO, true},
		"write":           {func(l *lossyTarget) { l.failWrite = true }, wait, 0, syscall.EIO, false},
		"zeroes":          {func(l *lossyTarget) { l.failZero = true }, wait, 0, syscall.EIO, false},
		"device":          {func(l *lossyTarget) { l.device = true }, wait, stop, context.Canceled, false},
	} {
		t.Run(name, func(t *testing.T) {
			journal := filepath.Join(t.TempDir(), "journal")
			target := newLossyTarget(p.Size)
			c.set(target)
			if res, err := target.run(t, try(target), journal, c.waitAt, c.stop); !errors.Is(err, c.want) {
				t.Fatalf("got %v, %+v", err, res)
			}
			if target.device {
				target.lose()
			}
			// A second interruption, before a sync: the new journal knows what is safe, too.
			second, err := target.run(t, try(target), journal, 0, 1)
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("got %v, %+v", err, second)
			}
			if target.device {
				target.lose()
			}
			res, err := target.run(t, try(target), journal, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			target.check(t, data)
			if !c.none && second.Resumed < restoreSync-64<<20 || res.Resumed < second.Resumed || c.none && second.Resumed > 0 {
				t.Errorf("continued at %d, then at %d", second.Resumed, res.Resumed)
			}
		})
	}
}

// TestRestoreAfterLossOfEarlierRun: a run that cannot make a journal and whose target
// fails leaves none of an earlier run that lists what was lost.
func TestRestoreAfterLossOfEarlierRun(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(8, 8)), 40<<20)
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}, BlockSize: lossyBlock})
	try := func(target RestoreTarget) func(context.Context, RestoreOptions) (RestoreResult, error) {
		return func(ctx context.Context, opt RestoreOptions) (RestoreResult, error) {
			return Restore(ctx, r, p, target, opt)
		}
	}
	dir := t.TempDir()
	short, long := filepath.Join(dir, "journal"), filepath.Join(dir, strings.Repeat("x", 250)) // too long for the name of a temporary file
	target := newLossyTarget(p.Size)
	if _, err := target.run(t, try(target), short, 0, 20<<20); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if err := os.Rename(short, long); err != nil {
		t.Fatal(err)
	}
	target.failSync = 1
	if res, err := target.run(t, try(target), long, 0, 0); !errors.Is(err, syscall.EIO) {
		t.Fatalf("got %v, %+v", err, res)
	}
	if err := os.Rename(long, short); err != nil { // now there is room for one
		t.Fatal(err)
	}
	if res, err := target.run(t, try(target), short, 0, 0); err != nil || res.Resumed != 0 {
		t.Fatalf("got %v, %+v", err, res)
	}
	target.check(t, data)
}

// TestNothingIsRecordedAfterLoss: workers that end their writes after the target failed do not
// list them, and a later sync does not cover them.
func TestNothingIsRecordedAfterLoss(t *testing.T) {
	dir := t.TempDir()
	j := &restoreJournal{path: filepath.Join(dir, "journal"), logger: slog.New(slog.DiscardHandler), open: map[int64]int64{},
		plan: []blocktree.Range{{Length: 10 * restoreUnit}}, old: []blocktree.Range{{Length: 3 * restoreUnit}}, safe: []blocktree.Range{{Length: restoreUnit}}}
	j.wanted = sync.NewCond(&j.mu)
	if err := j.create(journalHeader{Format: journalFormat, Unit: restoreUnit}); err != nil {
		t.Fatal(err)
	}
	defer j.close()
	if err := j.done(4*restoreUnit, 2*restoreUnit); err != nil {
		t.Fatal(err)
	}
	units := func() (done, safe []blocktree.Range) {
		t.Helper()
		b, err := os.ReadFile(j.path)
		if err != nil {
			t.Fatal(err)
		}
		_, lines, _ := bytes.Cut(b, []byte("\n"))
		return readUnits(lines, true)
	}
	if done, safe := units(); total(done) != 5*restoreUnit || !slices.Equal(safe, j.safe) {
		t.Fatalf("before: %v, of which %v are safe", done, safe)
	}
	j.targetFailed(syscall.EIO)
	if err := j.done(7*restoreUnit, restoreUnit); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v", err)
	}
	j.note("s 3")
	if done, safe := units(); !slices.Equal(done, j.safe) || !slices.Equal(safe, j.safe) {
		t.Errorf("after: %v, of which %v are safe", done, safe)
	}
}

// TestDistrustedJournal: a journal that cannot be cut is removed.
func TestDistrustedJournal(t *testing.T) {
	line := func(body string) string { return body + " " + lineSum(body) + "\n" }
	for name, c := range map[string]struct{ text, want string }{
		"nothing synced":  {"head\n" + line("w 0 3") + line("w 4 4"), "head\n"},
		"a part synced":   {"head\n" + line("w 0 3") + line("w 4 4") + line("s 1") + line("w 5 5"), "head\n" + line("w 0 3") + line("s 1")},
		"synced twice":    {"head\n" + line("w 0 3") + line("s 1") + line("w 4 4") + line("w 5 5") + line("s 2"), "head\n" + line("w 0 3") + line("s 1") + line("w 4 4") + line("s 2")},
		"torn":            {"head\n" + line("w 0 3") + line("s 1") + "w 4", "head\n" + line("w 0 3") + line("s 1")},
		"without a head":  {"head", ""},
		"not there, fine": {"", ""},
	} {
		path := filepath.Join(t.TempDir(), "journal")
		if c.text != "" {
			if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		distrustJournal(path, slog.New(slog.DiscardHandler))
		got, err := os.ReadFile(path)
		if string(got) != c.want || err != nil != (c.want == "") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

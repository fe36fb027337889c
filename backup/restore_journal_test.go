package backup

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
)

func TestRestoreResumes(t *testing.T) {
	r, _ := newRepo(t)
	rng := rand.New(rand.NewPCG(4, 4))
	data := randomBytes(rng, 200<<20)
	clear(data[100<<20 : 150<<20])
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}, BlockSize: 1 << 20})
	other, _ := mustBackup(t, r, Options{Volume: points.Volume{Namespace: "a", Name: "b", Cluster: "c"}, Disk: &memDisk{data: data[:len(data)-1]}})
	dir := t.TempDir()
	path, journal := filepath.Join(dir, "disk.img"), filepath.Join(dir, "state", "journal")
	done := int64(0)
	for _, failAfter := range []int64{30 << 20, 40 << 20, 50 << 20} {
		target := &brittleTarget{Target: openTarget(t, path, p.Size, true), failAfter: failAfter}
		res, err := Restore(t.Context(), r, p, target, RestoreOptions{Journal: journal})
		if !errors.Is(err, errBrittle) {
			t.Fatalf("got %v, %+v", err, res)
		}
		if res.Resumed < done-64<<20 || done > 0 && res.Resumed == 0 {
			t.Errorf("resumed at %d after %d were written", res.Resumed, done)
		}
		done = res.Resumed + res.Written
		if err := target.Close(); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(name string, p *points.Point, target RestoreTarget, opt RestoreOptions) {
		t.Helper()
		opt.Journal = journal
		if _, err := Restore(t.Context(), r, p, target, opt); !errors.Is(err, ErrOtherRestore) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	target := &brittleTarget{Target: openTarget(t, path, p.Size, true)}
	refused("another point", other, target, RestoreOptions{})
	refused("a delta over half a restore", p, target, RestoreOptions{Base: other})
	target.identity = "device 9:9"
	refused("another target", p, target, RestoreOptions{})
	target.identity = ""
	res := mustRestore(t, r, p, target, RestoreOptions{Journal: journal, Verify: true})
	if res.Resumed < done-64<<20 || target.written.Load() > int64(len(data))-done+64<<20 {
		t.Errorf("wrote %d after %d were: %+v", target.written.Load(), done, res)
	}
	checkFile(t, path, data)
	if _, err := os.Stat(journal); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the journal is still there: %v", err)
	}
	if left, err := os.ReadDir(filepath.Dir(journal)); err != nil || len(left) > 0 {
		t.Errorf("left in the state directory: %v, %v", left, err)
	}
}

// TestResumeFindsWhatWasChangedMeanwhile changes the target between an interrupted restore
// and the next run.
func TestResumeFindsWhatWasChangedMeanwhile(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(5, 5)), 60<<20)
	clear(data[8<<20 : 16<<20])
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}, BlockSize: 1 << 20})
	for name, change := range map[string]func(f *os.File) error{
		"the superblock": func(f *os.File) error { _, err := f.WriteAt([]byte("mounted"), 1024+48); return err },
		"half of it": func(f *os.File) error {
			_, err := f.WriteAt(randomBytes(rand.New(rand.NewPCG(6, 6)), 15<<20), 5<<20)
			return err
		},
		"the size": func(f *os.File) error { return f.Truncate(3 << 20) },
		"nothing":  func(*os.File) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path, journal := filepath.Join(dir, "disk.img"), filepath.Join(dir, "journal")
			brittle := &brittleTarget{Target: openTarget(t, path, p.Size, true), failAfter: 40 << 20}
			if _, err := Restore(t.Context(), r, p, brittle, RestoreOptions{Journal: journal, Workers: 1}); !errors.Is(err, errBrittle) {
				t.Fatal(err)
			}
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(change(f), f.Close(), brittle.Close()); err != nil {
				t.Fatal(err)
			}
			// A second failure right after it, since the new journal's content counts too.
			brittle = &brittleTarget{Target: openTarget(t, path, p.Size, true), failAfter: 1}
			opt := RestoreOptions{Journal: journal, SpotCheck: 0.001}
			if _, err := Restore(t.Context(), r, p, brittle, opt); !errors.Is(err, errBrittle) {
				t.Fatal(err)
			}
			if err := brittle.Close(); err != nil {
				t.Fatal(err)
			}
			res := mustRestore(t, r, p, openTarget(t, path, p.Size, true), opt)
			checkFile(t, path, data)
			if res.Resumed == 0 && name != "the size" {
				t.Errorf("all was written again: %+v", res)
			}
		})
	}
}

// TestRestoreJournalIsLocked starts a second restore while one runs, to a file that replaced
// the first one's target.
func TestRestoreJournalIsLocked(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(1, 1)), 1<<20)
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}})
	for name, opt := range map[string]RestoreOptions{"full": {Restart: true}, "compare": {Delta: true}} {
		dir := t.TempDir()
		opt.Journal = filepath.Join(dir, "journal")
		other := filepath.Join(dir, "other.img")
		old := randomBytes(rand.New(rand.NewPCG(2, 2)), 2<<20)
		if err := os.WriteFile(other, old, 0o600); err != nil {
			t.Fatal(err)
		}
		var second, kept error
		var once sync.Once
		mustRestore(t, r, p, openTarget(t, filepath.Join(dir, "disk.img"), p.Size, true), RestoreOptions{Journal: opt.Journal, Progress: func(pr Progress) {
			if pr.Done > 0 {
				once.Do(func() {
					_, second = Restore(context.Background(), r, p, openTarget(t, other, p.Size, true), opt)
					_, kept = os.Stat(opt.Journal)
				})
			}
		}})
		if !errors.Is(second, ErrOtherRestore) || kept != nil {
			t.Errorf("%s: got %v; its journal: %v", name, second, kept)
		}
		checkFile(t, other, old)
	}
}

// TestInterruptedCompareLeavesNoJournal: a restore that compares overwrites what an earlier
// one, of another point, had written and recorded: no restore continues from that journal.
func TestInterruptedCompareLeavesNoJournal(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(3, 3)), 20<<20)
	first, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: bytes.Clone(data)}, BlockSize: 1 << 20})
	changed := bytes.Clone(data)
	for i := 0; i < len(changed); i += 3 << 20 {
		changed[i]++
	}
	second, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: changed}})
	dir := t.TempDir()
	path, journal := filepath.Join(dir, "disk.img"), filepath.Join(dir, "journal")
	for _, step := range []struct {
		point *points.Point
		opt   RestoreOptions
		after int64
	}{
		{first, RestoreOptions{Journal: journal, Workers: 1}, 18 << 20},
		{second, RestoreOptions{Journal: journal, Workers: 1, Delta: true}, 2 << 20},
	} {
		brittle := &brittleTarget{Target: openTarget(t, path, first.Size, true), failAfter: step.after}
		if _, err := Restore(t.Context(), r, step.point, brittle, step.opt); !errors.Is(err, errBrittle) {
			t.Fatal(err)
		}
		if err := brittle.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(journal); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the first restore's journal: %v", err)
	}
	if res := mustRestore(t, r, first, openTarget(t, path, first.Size, true), RestoreOptions{Journal: journal}); res.Resumed != 0 {
		t.Errorf("%d bytes were taken for the first point's", res.Resumed)
	}
	checkFile(t, path, data)
}

// TestRestoreWithoutRoomForJournal: without room for a journal the restore succeeds.
func TestRestoreWithoutRoomForJournal(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(1, 2)), 9<<20)
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}})
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, journal := range map[string]string{
		"cannot be looked for": filepath.Join(file, "journal"),
		"cannot be made":       filepath.Join(dir, strings.Repeat("x", 250)), // too long for the name of a temporary file
	} {
		for _, delta := range []bool{false, true} {
			path := filepath.Join(t.TempDir(), "disk.img")
			mustRestore(t, r, p, openTarget(t, path, p.Size, true), RestoreOptions{Journal: journal, Delta: delta, Verify: true})
			checkFile(t, path, data)
			if _, err := os.Stat(journal); err == nil {
				t.Errorf("%s, and is there", name)
			}
		}
	}
}

// TestRestoreEndsJournalThatCannotBeReplaced: the journal of an earlier restore must not
// describe what is written now.
func TestRestoreEndsJournalThatCannotBeReplaced(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(1, 3)), 9<<20)
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}})
	for _, restart := range []bool{false, true} {
		dir := t.TempDir()
		path, short, long := filepath.Join(dir, "disk.img"), filepath.Join(dir, "journal"), filepath.Join(dir, strings.Repeat("x", 250))
		brittle := &brittleTarget{Target: openTarget(t, path, p.Size, true), failAfter: 6 << 20}
		if _, err := Restore(t.Context(), r, p, brittle, RestoreOptions{Journal: short}); !errors.Is(err, errBrittle) {
			t.Fatal(err)
		}
		if err := os.Rename(short, long); err != nil {
			t.Fatal(err)
		}
		var gone atomic.Bool
		mustRestore(t, r, p, brittle.Target, RestoreOptions{Journal: long, Restart: restart, Progress: func(Progress) {
			if _, err := os.Stat(long); err != nil {
				gone.Store(true)
			}
		}})
		if _, err := os.Stat(long); err == nil || gone.Load() != restart {
			t.Errorf("restart %v: gone while it was written to: %v; in the end: %v", restart, gone.Load(), err)
		}
		checkFile(t, path, data)
	}
}

// TestJournalIsFull: a journal that cannot be written further ends, and the restore
// continues.
func TestJournalIsFull(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	j := &restoreJournal{path: full.Name(), f: full, logger: slog.New(slog.DiscardHandler), open: map[int64]int64{}, plan: []blocktree.Range{{Length: restoreSync}}}
	j.wanted = sync.NewCond(&j.mu)
	end := j.syncInBackground(&memTarget{})
	if err := errors.Join(j.done(0, restoreSync), end()); err != nil || !j.mute {
		t.Errorf("mute %v, %v", j.mute, err)
	}
}

func TestReadUnits(t *testing.T) {
	line := func(body string) string { return body + " " + lineSum(body) + "\n" }
	unit := func(first, n int64) blocktree.Range {
		return blocktree.Range{Offset: first * restoreUnit, Length: n * restoreUnit}
	}
	for name, c := range map[string]struct {
		text   string
		cached bool
		want   []blocktree.Range
	}{
		"empty":       {"", true, nil},
		"same boot":   {line("w 0 3") + line("w 7 7"), true, []blocktree.Range{unit(0, 4), unit(7, 1)}},
		"power cut":   {line("w 0 3") + line("w 4 4") + line("s 1") + line("w 7 7"), false, []blocktree.Range{unit(0, 4)}},
		"none synced": {line("w 0 3"), false, nil},
		"torn":        {line("w 0 3") + "w 4 5 12", true, []blocktree.Range{unit(0, 4)}},
		"damaged":     {line("w 0 3") + strings.Replace(line("w 4 4"), "w 4 4", "w 4 9", 1) + line("w 20 20"), true, []blocktree.Range{unit(0, 4)}},
		"backwards":   {line("w 5 3"), true, nil},
		"huge":        {line("w 0 9223372036854775807"), true, nil},
		"more synced": {line("w 0 3") + line("s 2"), false, nil},
	} {
		if got, _ := readUnits([]byte(c.text), c.cached); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}

func FuzzReadUnits(f *testing.F) {
	f.Add([]byte("w 0 3 "+lineSum("w 0 3")+"\n"), true)
	f.Fuzz(func(t *testing.T, p []byte, same bool) {
		end := int64(-1)
		done, safe := readUnits(p, same)
		if left := subtractRanges(safe, done); len(left) > 0 {
			t.Fatalf("%v are safe but not done", left)
		}
		for _, r := range done {
			if r.Offset <= end || r.Length <= 0 {
				t.Fatalf("range %v after %d", r, end)
			}
			end = r.Offset + r.Length
		}
	})
}

package overlay

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
)

// kill closes an overlay as the kernel does for a killed process: nothing is flushed or
// removed.
func kill(t *testing.T, o *Overlay) {
	t.Helper()
	if err := errors.Join(o.data.Close(), o.log.file.Close(), o.log.recent.close()); err != nil {
		t.Fatal(err)
	}
}

// Each write, trim and zeroing survives a kill at any moment, flushed or not, and any number
// of kills.
func TestKilledAfterEachChange(t *testing.T) {
	base := newBase(segmentSize + 3*Granule + 77)
	opt := Options{Dir: filepath.Join(t.TempDir(), "overlay"), BaseID: "a", Keep: true}
	model := bytes.Clone(base)
	r := rand.New(rand.NewPCG(11, 12))
	o := open(t, base, opt)
	for round := range 40 {
		for range r.IntN(12) {
			step(t, r, o, model)
		}
		used := o.Used()
		kill(t, o)
		if o = open(t, base, opt); o.Used() != used {
			t.Fatalf("%d bytes used before the kill, %d after", used, o.Used())
		}
		if round%3 == 0 { // a flush continues where the killed
			if err := o.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		check(t, o, base, model)
	}
	// What was flushed needs only the map, as after a power failure.
	if err := o.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	kill(t, o)
	if err := os.Remove(filepath.Join(opt.Dir, "recent")); err != nil {
		t.Fatal(err)
	}
	o = open(t, base, opt)
	check(t, o, base, model)
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(opt.Dir, "recent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("changes that were flushed are noted still: %v", err)
	}
	check(t, open(t, base, opt), base, model)
}

const killedWriter = "VARVE_TEST_KILLED_WRITER"

// A real process that is killed with SIGKILL in the middle of its writes.
func TestKilledProcess(t *testing.T) {
	const writers, area = 4, 64 * Granule
	base := newBase(writers * area)
	if dir := os.Getenv(killedWriter); dir != "" {
		writeUntilKilled(t, base, dir, area)
	}
	dir := filepath.Join(t.TempDir(), "overlay")
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledProcess$")
	cmd.Env = append(os.Environ(), killedWriter+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// The last acknowledged value of each granule.
	acked := map[int64]byte{}
	const enough = writers * area / Granule / 2 // of more than one writer, however they take turns
	lines, killed := bufio.NewScanner(out), false
	for n := 0; lines.Scan(); n++ {
		var granule int64
		var value byte
		if _, err := fmt.Sscan(lines.Text(), &granule, &value); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		acked[granule] = value
		if n >= 2000 && len(acked) >= enough && !killed {
			killed = true
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait()
	if len(acked) < enough {
		t.Fatalf("the process acknowledged %d granules before its end", len(acked))
	}
	opt := Options{Dir: dir, BaseID: "a", Keep: true}
	for range 2 {
		o := open(t, base, opt)
		if err := o.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		got := content(t, o)
		for granule, value := range acked {
			b := got[granule*Granule : (granule+1)*Granule]
			// One more may have been written whose acknowledgement was not read.
			if b[0] < value || !bytes.Equal(b, bytes.Repeat(b[:1], Granule)) {
				t.Errorf("granule %d holds %d, acknowledged %d", granule, b[0], value)
			}
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// writeUntilKilled writes growing values and prints each on standard output once the write
// has returned.
func writeUntilKilled(t *testing.T, base Base, dir string, area int64) {
	o := open(t, base, Options{Dir: dir, BaseID: "a", Keep: true})
	var mu sync.Mutex
	var writers sync.WaitGroup
	for w := range base.Size() / area {
		writers.Go(func() {
			for value := byte(1); value < 250; value++ {
				for at := w * area; at < (w+1)*area; at += Granule {
					if _, err := o.WriteAt(context.Background(), bytes.Repeat([]byte{value}, Granule), at); err != nil {
						t.Error(err)
					}
					mu.Lock()
					fmt.Println(at/Granule, value) //nolint:forbidigo // what the parent reads
					mu.Unlock()
				}
			}
		})
	}
	writers.Wait()
	os.Exit(0)
}

// After a restart of the machine the latest changes are not used: their data may be missing.
// What was flushed is intact, and all else is old or new.
func TestOtherBoot(t *testing.T) {
	base := newBase(1 << 20)
	opt := Options{Dir: filepath.Join(t.TempDir(), "overlay"), BaseID: "a", Keep: true}
	o := open(t, base, opt)
	ctx := t.Context()
	if _, err := o.WriteAt(ctx, []byte("flushed"), 0); err != nil {
		t.Fatal(err)
	}
	if err := o.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt(ctx, []byte("not flushed"), 16*Granule); err != nil {
		t.Fatal(err)
	}
	kill(t, o)
	path := filepath.Join(opt.Dir, "recent")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if head := recentHead(o.log.head.id, bootID()); !bytes.Equal(b[:recentHeader], head) {
		t.Fatal("the file does not begin with its header")
	}
	copy(b, recentHead(o.log.head.id, "11111111-2222-3333-4444-555555555555"))
	// The data may not have reached the disk.
	if err := errors.Join(os.WriteFile(path, b, 0o600), zeroAt(filepath.Join(opt.Dir, "data"), 16*Granule)); err != nil {
		t.Fatal(err)
	}
	o = open(t, base, opt)
	got := content(t, o)
	if string(got[:7]) != "flushed" || !bytes.Equal(got[16*Granule:17*Granule], base[16*Granule:17*Granule]) {
		t.Errorf("it reads %q and %q", got[:7], got[16*Granule:16*Granule+11])
	}
	if _, err := o.WriteAt(ctx, []byte("goes on"), 32*Granule); err != nil {
		t.Fatal(err)
	}
	kill(t, o)
	if got := content(t, open(t, base, opt)); string(got[32*Granule:32*Granule+7]) != "goes on" {
		t.Error("a change after the start was lost")
	}
}

func zeroAt(path string, off int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, Granule), off)
	return errors.Join(err, f.Close())
}

// Changes after a failed sync are not restored: their data may be lost.
func TestFailedSyncForgets(t *testing.T) {
	base := newBase(1 << 20)
	opt := Options{Dir: filepath.Join(t.TempDir(), "overlay"), BaseID: "a", Keep: true}
	o := open(t, base, opt)
	if _, err := o.WriteAt(t.Context(), []byte("lost"), 0); err != nil {
		t.Fatal(err)
	}
	if err := o.fail(syscall.EIO); !errors.Is(o.Flush(t.Context()), syscall.EIO) {
		t.Fatalf("a flush after %v", err)
	}
	kill(t, o)
	check(t, open(t, base, opt), base, base)
}

// A file of changes belongs to one overlay: not to an earlier one in the directory, or one
// whose map was copied there.
func TestRecentOfAnotherOverlay(t *testing.T) {
	base := newBase(1 << 20)
	opt := Options{Dir: filepath.Join(t.TempDir(), "overlay"), BaseID: "a", Keep: true}
	o := open(t, base, opt)
	if _, err := o.WriteAt(t.Context(), []byte("first"), 0); err != nil {
		t.Fatal(err)
	}
	kill(t, o)
	if err := errors.Join(os.Remove(filepath.Join(opt.Dir, "map")), os.Remove(filepath.Join(opt.Dir, "data"))); err != nil {
		t.Fatal(err)
	}
	again := open(t, base, opt)
	check(t, again, base, base)
	if again.ID() == o.ID() {
		t.Error("two overlays have one ID")
	}
	kill(t, again)
	if last := open(t, base, opt); last.ID() != again.ID() {
		t.Error("the ID of an overlay did not stay")
	}
}

// A map of version 1 is read and rewritten.
func TestVersion1(t *testing.T) {
	base := newBase(1 << 20)
	opt := Options{Dir: filepath.Join(t.TempDir(), "overlay"), BaseID: "a", Keep: true}
	if err := os.Mkdir(opt.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b := header{version: 1, size: 1 << 20, baseID: "a"}.encode()
	b = append(b, encodeFrame(1, []stateRun{{3, 2, isZero}})...)
	if err := os.WriteFile(filepath.Join(opt.Dir, "map"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	model := bytes.Clone(base)
	clear(model[3*Granule : 5*Granule])
	for range 2 {
		o := open(t, base, opt)
		check(t, o, base, model)
		if _, err := o.WriteAt(t.Context(), []byte("more"), 0); err != nil {
			t.Fatal(err)
		}
		copy(model, "more")
		kill(t, o)
	}
	check(t, open(t, base, opt), base, model)
}

// The areas alternate for ever, whether flushes work or not, and a reader finds every change
// that is not in the map.
func TestRecentAreas(t *testing.T) {
	const granules = 1 << 20
	dir := testRoot(t)
	id := newOverlayID()
	r, runs, err := openRecent(dir, id, granules)
	if err != nil || len(runs) != 0 {
		t.Fatalf("%v, %v", runs, err)
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	var all []stateRun
	durable, taken := 0, -1 // changes in the map, or in the current flush
	for range 60 {
		for range rnd.IntN(areaSlots / 8) {
			run := stateRun{start: int64(len(all) % granules), count: 1, state: state(len(all) % 3)}
			if err := r.add(run); errors.Is(err, errRecentFull) {
				if taken >= 0 || len(all)-durable < areaSlots {
					t.Fatalf("full with %d changes, of which %d are in the map", len(all), durable)
				}
				break
			} else if err != nil {
				t.Fatal(err)
			}
			all = append(all, run)
		}
		switch rnd.IntN(6) {
		case 0, 1, 2:
			if taken >= 0 {
				r.flushed()
				durable = taken
			}
			r.turn()
			taken = len(all)
		case 3:
			taken = -1 // it failed
		case 4:
			if err := r.close(); err != nil {
				t.Fatal(err)
			}
			if r, runs, err = openRecent(dir, id, granules); err != nil {
				t.Fatal(err)
			}
			if n := len(runs); n < len(all)-durable || n > len(all) || !slices.Equal(runs, all[len(all)-n:]) {
				t.Fatalf("%d changes found; of %d, %d are in the map", n, len(all), durable)
			}
			taken = -1
			if r.full() && rnd.IntN(2) == 0 {
				durable = len(all)
				r.flushed()
			}
		}
	}
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
}

// A file system that cannot map files is only slower.
func TestRecentUnmapped(t *testing.T) {
	dir := testRoot(t)
	id := newOverlayID()
	r, _, err := openRecent(dir, id, 100)
	if err != nil {
		t.Fatal(err)
	}
	r.mem = nil
	want := []stateRun{{1, 2, inData}, {5, 1, isZero}}
	for _, run := range want {
		if err := r.add(run); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
	if err := r.add(want[0]); err == nil {
		t.Error("a closed file took a change")
	}
	if _, runs, err := openRecent(dir, id, 100); err != nil || !slices.Equal(runs, want) {
		t.Errorf("%v, %v", runs, err)
	}
}

// A store without space in the file system is an error, not the end of the process.
func TestRecentFault(t *testing.T) {
	r, _, err := openRecent(testRoot(t), newOverlayID(), 100)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close() // not tested here
	if err := r.add(stateRun{1, 1, inData}); err != nil {
		t.Fatal(err)
	}
	if err := r.file.Truncate(0); err != nil { // as without space
		t.Fatal(err)
	}
	if err := r.add(stateRun{2, 1, inData}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v", err)
	}
}

func FuzzRecent(f *testing.F) {
	var a, b [slotSize]byte
	encodeSlot(&a, 7, stateRun{1, 2, inData})
	encodeSlot(&b, 8, stateRun{3, 1, isZero})
	f.Add(slices.Concat(a[:], b[:]))
	f.Add(slices.Concat(b[:], a[:]))
	f.Add(a[:slotSize-1])
	over := a
	binary.LittleEndian.PutUint64(over[8:], 1<<40)
	binary.LittleEndian.PutUint32(over[24:], crc32.Checksum(over[:24], castagnoli))
	f.Add(over[:])
	f.Fuzz(func(t *testing.T, b []byte) {
		runs, first, err := readArea(bytes.NewReader(b), 10)
		if err != nil || len(runs) > len(b)/slotSize || len(runs) > 0 && first == 0 {
			t.Fatalf("%d changes from %d: %v", len(runs), first, err)
		}
		for _, r := range runs {
			if r.start < 0 || r.count < 0 || r.start+r.count > 10 || r.state > isZero {
				t.Fatalf("run out of bounds: %+v", r)
			}
		}
	})
}

// testRoot is an empty directory.
func testRoot(t *testing.T) *os.Root {
	t.Helper()
	dir, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() }) // only read
	return dir
}

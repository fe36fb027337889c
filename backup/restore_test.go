package backup

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// sparseDisk is size bytes with random blocks at some places.
func sparseDisk(rng *rand.Rand, size int) []byte {
	data := make([]byte, size)
	for range 1 + size/(1<<20) {
		if size > 0 {
			off := rng.IntN(size)
			copy(data[off:], randomBytes(rng, min(size-off, 1+rng.IntN(200<<10))))
		}
	}
	return data
}

func openTarget(t *testing.T, path string, size int64, keep bool) *disk.Target {
	t.Helper()
	target, err := disk.OpenTarget(path, disk.TargetOptions{Size: size, Keep: keep})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := target.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return target
}

func mustRestore(t *testing.T, r *repository.Repository, p *points.Point, target RestoreTarget, opt RestoreOptions) RestoreResult {
	t.Helper()
	res, err := Restore(t.Context(), r, p, target, opt)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func checkFile(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s differs from the disk", path)
	}
}

func TestRestoreToFile(t *testing.T) {
	r, _ := newRepo(t)
	rng := rand.New(rand.NewPCG(1, 1))
	const block = blocktree.MinBlockSize
	for i, size := range []int{0, 1, 511, block - 1, block + 1, blocktree.SegmentSize + 5} {
		v := points.Volume{Namespace: "restore", Name: fmt.Sprint(size), Cluster: "test"}
		data := sparseDisk(rng, size)
		p, _ := mustBackup(t, r, Options{Volume: v, Disk: &memDisk{data: data}, BlockSize: block})
		path := filepath.Join(t.TempDir(), "disk.img")
		if i%2 == 0 { // over an older, longer file
			if err := os.WriteFile(path, bytes.Repeat([]byte{0xff}, size+1000), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		target := openTarget(t, path, int64(size), i%3 == 0)
		res := mustRestore(t, r, p, target, RestoreOptions{Verify: true, Journal: filepath.Join(t.TempDir(), "journal")})
		checkFile(t, path, data)
		if res.Verified != int64(size) || res.Written+res.Zeroed != int64(size) || res.Mode != RestoreFull {
			t.Errorf("size %d: result %+v", size, res)
		}
		if size > block {
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if used := st.Sys().(*syscall.Stat_t).Blocks * 512; used > res.Written+1<<20 {
				t.Errorf("size %d: the file takes %d bytes for %d of data", size, used, res.Written)
			}
		}
		var out bytes.Buffer
		if _, err := RestoreTo(t.Context(), r, p, &out, RestoreOptions{}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), data) {
			t.Errorf("size %d: the stream differs", size)
		}
	}
}

// loopDevice puts a loop device of a sector size over a new file of 0xff.
func loopDevice(t *testing.T, size, sector int) (dev, file string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("loop devices need root")
	}
	file = filepath.Join(t.TempDir(), "loop.img")
	if err := os.WriteFile(file, bytes.Repeat([]byte{0xff}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--show", "-f", "--sector-size", strconv.Itoa(sector), file).Output()
	if err != nil {
		t.Skipf("no loop device of %d-byte sectors here: %v", sector, err)
	}
	dev = strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	return dev, file
}

func TestRestoreToDevice(t *testing.T) {
	r, _ := newRepo(t)
	for _, sector := range []int{512, 4096} {
		t.Run(strconv.Itoa(sector), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(2, uint64(sector)))
			size := 9<<20 + 700 // not whole sectors
			data := sparseDisk(rng, size)
			v := points.Volume{Namespace: "restore", Name: fmt.Sprintf("dev-%d", sector), Cluster: "test"}
			p, _ := mustBackup(t, r, Options{Volume: v, Disk: &memDisk{data: data}})
			dev, _ := loopDevice(t, 10<<20, sector)
			target := openTarget(t, dev, int64(size), true)
			mustRestore(t, r, p, target, RestoreOptions{Verify: true})
			got, err := os.ReadFile(dev)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got[:size], data) {
				t.Error("the device differs")
			}
			if tail := got[size:]; !bytes.Equal(tail, bytes.Repeat([]byte{0xff}, len(tail))) {
				t.Error("bytes behind the disk were touched")
			}
		})
	}
}

// twoPoints makes a volume with two points of random disks.
func twoPoints(t *testing.T, r *repository.Repository, seed uint64, size, size2 int) (a, b *points.Point, dataA, dataB []byte) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 9))
	v := points.Volume{Namespace: "restore", Name: fmt.Sprintf("two-%d", seed), Cluster: "test"}
	dataA = sparseDisk(rng, size)
	a, _ = mustBackup(t, r, Options{Volume: v, Disk: &memDisk{data: dataA}})
	dataB = make([]byte, size2)
	copy(dataB, dataA)
	for range 4 {
		off := rng.IntN(size2 - 300<<10)
		copy(dataB[off:], randomBytes(rng, 1000))
		clear(dataB[rng.IntN(size2-300<<10):][:200<<10])
	}
	b, _ = mustBackup(t, r, Options{Volume: v, Disk: &memDisk{data: dataB}, AllowShrink: true})
	return a, b, dataA, dataB
}

func TestDeltaRestore(t *testing.T) {
	r, _ := newRepo(t)
	for i, size2 := range []int{70 << 20, 72<<20 + 5, 66<<20 + 1} {
		a, b, dataA, dataB := twoPoints(t, r, uint64(i), 70<<20, size2)
		for _, base := range []bool{false, true} {
			for _, back := range []bool{false, true} { // b over a, and a over b
				from, to, have, want := a, b, dataA, dataB
				if back {
					from, to, have, want = b, a, dataB, dataA
				}
				path := filepath.Join(t.TempDir(), "disk.img")
				have = slices.Clone(have)
				opt := RestoreOptions{Delta: true, Verify: true, SpotCheck: 0.01, Journal: filepath.Join(t.TempDir(), "journal")}
				if base {
					opt.Base = from
					// The target changed since, and a list says where.
					off := int64(33 << 20)
					have[off] ^= 1
					have[off+7000] ^= 1
					opt.Changed = []blocktree.Range{{Offset: off - 3, Length: 4}, {Offset: off + 7000, Length: 1 << 40}}
					opt.Changed[1].Length = 1
				} else {
					have[12345678] ^= 1
				}
				if err := os.WriteFile(path, have, 0o600); err != nil {
					t.Fatal(err)
				}
				res := mustRestore(t, r, to, openTarget(t, path, to.Size, true), opt)
				checkFile(t, path, want)
				if res.Written+res.Zeroed > 8<<20 || res.Unchanged < 50<<20 {
					t.Errorf("%d, base %v, back %v: %+v", size2, base, back, res)
				}
				if base && res.Checked == 0 {
					t.Error("nothing was checked")
				}
			}
		}
	}
}

func TestDeltaRefusesTargetThatIsNotTheBase(t *testing.T) {
	r, _ := newRepo(t)
	a, b, dataA, dataB := twoPoints(t, r, 77, 70<<20, 70<<20)
	changed := bytes.Clone(dataA)
	for i := 0; i < len(changed); i += 1 << 20 {
		changed[i+500] ^= 1
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, changed, 0o600); err != nil {
		t.Fatal(err)
	}
	opt := RestoreOptions{Base: a, SpotCheck: 0.001}
	target := openTarget(t, path, b.Size, true)
	_, err := Restore(t.Context(), r, b, target, opt)
	if !errors.Is(err, ErrNotBase) || !strings.Contains(err.Error(), "bytes ") {
		t.Fatalf("got %v", err)
	}
	checkFile(t, path, changed)
	// The neighbours of what differs are checked at any share.
	off := firstDifference(dataA, dataB)/spotUnit*spotUnit - 1
	near := bytes.Clone(dataA)
	near[off] ^= 1
	if err := os.WriteFile(path, near, 0o600); err != nil {
		t.Fatal(err)
	}
	opt.SpotCheck = 1e-9
	if _, err := Restore(t.Context(), r, b, target, opt); !errors.Is(err, ErrNotBase) {
		t.Errorf("got %v", err)
	}
}

// TestRefusedRestoreLeavesTarget: a refused restore does not change a target of any size.
func TestRefusedRestoreLeavesTarget(t *testing.T) {
	r, _ := newRepo(t)
	a, b, _, _ := twoPoints(t, r, 78, 5<<20, 5<<20)
	journal := filepath.Join(t.TempDir(), "journal")
	brittle := &brittleTarget{Target: openTarget(t, filepath.Join(t.TempDir(), "other.img"), a.Size, true), failAfter: 1}
	if _, err := Restore(t.Context(), r, a, brittle, RestoreOptions{Journal: journal}); !errors.Is(err, errBrittle) {
		t.Fatal(err)
	}
	for size, name := range map[int]string{40 << 20: "longer", 3<<20 + 1: "shorter", 5 << 20: "equal"} {
		for _, c := range []struct {
			opt  RestoreOptions
			want error
		}{
			{RestoreOptions{Base: a, SpotCheck: 0.001}, ErrNotBase},
			{RestoreOptions{Base: a, Journal: journal}, ErrOtherRestore},
			{RestoreOptions{Journal: journal}, ErrOtherRestore},
		} {
			path := filepath.Join(t.TempDir(), "disk.img")
			old := randomBytes(rand.New(rand.NewPCG(3, uint64(size))), size)
			if err := os.WriteFile(path, old, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Restore(t.Context(), r, b, openTarget(t, path, b.Size, true), c.opt); !errors.Is(err, c.want) {
				t.Errorf("%s: got %v", name, err)
			}
			checkFile(t, path, old)
		}
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

func TestRestoreRefusesSmallTarget(t *testing.T) {
	r, _ := newRepo(t)
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: make([]byte, 5000)}})
	path := filepath.Join(t.TempDir(), "disk.img")
	if _, err := Restore(t.Context(), r, p, openTarget(t, path, 4999, true), RestoreOptions{}); !errors.Is(err, ErrTargetTooSmall) {
		t.Errorf("got %v", err)
	}
}

// brittleTarget wraps a target: it counts writes, damages one, and is full at some point.
type brittleTarget struct {
	*disk.Target
	written   atomic.Int64
	failAfter int64 // bytes; 0 for never
	flip      int64 // offset of a byte written wrong; 0 for none
	identity  string

	mu     sync.Mutex
	writes []blocktree.Range
}

var errBrittle = fmt.Errorf("the target broke: %w", syscall.ENOSPC)

func (b *brittleTarget) WriteAt(p []byte, off int64) (int, error) {
	if n := b.written.Add(int64(len(p))); b.failAfter > 0 && n > b.failAfter {
		return 0, errBrittle
	}
	b.mu.Lock()
	b.writes = append(b.writes, blocktree.Range{Offset: off, Length: int64(len(p))})
	b.mu.Unlock()
	if b.flip >= off && b.flip < off+int64(len(p)) && b.flip > 0 {
		p = bytes.Clone(p)
		p[b.flip-off] ^= 1
	}
	return b.Target.WriteAt(p, off)
}

// Direct is true also where the tests' files are on a file system without direct I/O.
func (b *brittleTarget) Direct() bool { return true }

func (b *brittleTarget) Identity() string {
	if b.identity != "" {
		return b.identity
	}
	return b.Target.Identity()
}

func TestVerifyFindsWhatWasNotWritten(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(1, 8)), 6<<20)
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}})
	path, journal := filepath.Join(t.TempDir(), "disk.img"), filepath.Join(t.TempDir(), "journal")
	target := &brittleTarget{Target: openTarget(t, path, p.Size, true), flip: 5 << 20}
	if _, err := Restore(t.Context(), r, p, target, RestoreOptions{Verify: true, Journal: journal}); !errors.Is(err, ErrVerify) {
		t.Fatalf("got %v", err)
	}
	target.flip = 0 // another run must not take it for done
	mustRestore(t, r, p, target, RestoreOptions{Verify: true, Journal: journal})
	checkFile(t, path, data)
}

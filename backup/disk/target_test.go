package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// scribble writes and zeroes at random, on the target and on model, and compares what
// the target reads back and what the file or device holds in the end.
func scribble(t *testing.T, target *Target, path string, model []byte, seed uint64) {
	t.Helper()

	dice := rand.New(rand.NewPCG(seed, 11))
	memory := AlignedBuffer(len(model) + 64)
	size := len(model)

	for range 60 {
		if size == 0 {
			break
		}

		offset := dice.IntN(size)
		length := 1 + dice.IntN(min(size-offset, 300_000))

		if dice.IntN(2) == 0 { // aligned
			offset &^= pageSize - 1
			length = min((length+pageSize-1)&^(pageSize-1), size-offset)
		}

		switch dice.IntN(5) {
		case 0, 1:
			p := memory[dice.IntN(2)*dice.IntN(64):][:length]
			copy(p, random(int64(length), dice.Uint64()))
			copy(model[offset:], p)

			if n, err := target.WriteAt(p, int64(offset)); n != length || err != nil {
				t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", length, offset, n, err)
			}
		case 2, 3:
			clear(model[offset : offset+length])

			if err := target.ZeroRange(int64(offset), int64(length)); err != nil {
				t.Fatalf("ZeroRange(%d, %d): %v", offset, length, err)
			}
		default:
			p := memory[dice.IntN(2)*dice.IntN(64):][:length]
			if n, err := target.ReadAt(p, int64(offset)); n != length || err != nil && !errors.Is(err, io.EOF) {
				t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", length, offset, n, err)
			}

			if !bytes.Equal(p, model[offset:offset+length]) {
				t.Fatalf("ReadAt(%d bytes, %d): not what was written", length, offset)
			}
		}
	}

	if err := target.Sync(); err != nil {
		t.Fatal(err)
	}

	checkReads(t, target, model)

	if err := target.Close(); err != nil {
		t.Fatal(err)
	}

	checkReads(t, openSource(t, path, Options{}), model)
}

func TestTargetNewFile(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 4095, 4096, 4097, 1<<20 - 1, 1<<20 + 1, 3 << 20} {
		for _, buffered := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d buffered %v", size, buffered), func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "new.img")
				target := openTarget(t, path, TargetOptions{Size: size, Buffered: buffered})

				if !target.Fresh() || target.Size() != size || target.Device() {
					t.Errorf("Fresh %v, Size %d, Device %v", target.Fresh(), target.Size(), target.Device())
				}

				scribble(t, target, path, make([]byte, size), uint64(size))
			})
		}
	}
}

func TestTargetInMemory(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "varve")
	if err != nil {
		t.Skipf("no file system in memory: %v", err)
	}

	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})

	path := filepath.Join(dir, "new.img")
	scribble(t, openTarget(t, path, TargetOptions{Size: 1<<20 + 5}), path, make([]byte, 1<<20+5), 1)
}

func TestTargetKeepsAFile(t *testing.T) {
	content := random(1<<20+99, 1)

	for _, size := range []int64{1<<20 + 99, 1 << 19, 2 << 20} {
		path := tempFile(t, content)
		target := openTarget(t, path, TargetOptions{Size: size, Keep: true})
		if info, err := os.Stat(path); err != nil || info.Size() != int64(len(content)) {
			t.Errorf("the size was changed before it was asked for: %v", err)
		}

		if err := target.Fit(); err != nil {
			t.Fatal(err)
		}

		if target.Fresh() || target.Size() != size {
			t.Errorf("Fresh %v, Size %d; want false, %d", target.Fresh(), target.Size(), size)
		}

		model := make([]byte, size)
		copy(model, content)
		scribble(t, target, path, model, uint64(size))
	}
}

func TestTargetEmptiesAFile(t *testing.T) {
	path := tempFile(t, random(1<<20, 1))
	target := openTarget(t, path, TargetOptions{Size: 5000})

	if !target.Fresh() || target.Size() != 5000 {
		t.Errorf("Fresh %v, Size %d; want true, 5000", target.Fresh(), target.Size())
	}

	checkReads(t, target, make([]byte, 5000))
}

func TestTargetDevice(t *testing.T) {
	for _, sector := range sectorSizes {
		for _, size := range loopSizes {
			if size%sector != 0 {
				continue
			}

			for _, buffered := range []bool{false, true} {
				t.Run(fmt.Sprintf("%d of %d buffered %v", size, sector, buffered), func(t *testing.T) {
					model := random(size, 1)
					device := loop(t, tempFile(t, model), sectorOption(sector))
					target := openTarget(t, device, TargetOptions{Size: size, Buffered: buffered})

					if target.Fresh() || !target.Device() || target.Size() != size || target.SectorSize() != sector || target.Direct() == buffered {
						t.Errorf("Fresh %v, Device %v, Size %d, SectorSize %d, Direct %v",
							target.Fresh(), target.Device(), target.Size(), target.SectorSize(), target.Direct())
					}

					scribble(t, target, device, model, uint64(size))
				})
			}
		}
	}
}

// TestTargetZeroMethods goes down the ladder of ways to make zeroes.
func TestTargetZeroMethods(t *testing.T) {
	for _, method := range []zeroMethod{zeroByIoctl, zeroByHole, zeroByRange, zeroByWrite} {
		path := tempFile(t, random(1<<20, 1))
		target := openTarget(t, path, TargetOptions{Size: 1 << 20, Keep: true})
		target.zeroing.Store(int32(method)) // zeroByIoctl does not work on a file

		if err := target.ZeroRange(0, 1<<20); err != nil {
			t.Fatalf("method %d: %v", method, err)
		}

		checkReads(t, target, make([]byte, 1<<20))

		if now := zeroMethod(target.zeroing.Load()); method == zeroByIoctl && now != zeroByWrite || now < method {
			t.Errorf("method %d became %d", method, now)
		}
	}
}

// TestTargetStaysSparse: zeroes and what was not written take no room.
func TestTargetStaysSparse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new.img")
	target := openTarget(t, path, TargetOptions{Size: 64 << 20})

	if err := target.ZeroRange(0, 64<<20); err != nil {
		t.Fatal(err)
	}

	if _, err := target.WriteAt(random(8<<20, 1), 4<<20); err != nil {
		t.Fatal(err)
	}

	if err := target.ZeroRange(3<<20, 8<<20); err != nil {
		t.Fatal(err)
	}

	if err := target.Sync(); err != nil {
		t.Fatal(err)
	}

	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}

	if room := st.Blocks * 512; room < 1<<20 || room > 2<<20 {
		t.Errorf("the file takes %d bytes, want a little over 1 MiB", room)
	}
}

// TestTargetReadsTheDisk: with or without direct I/O, reading back must not be served
// by the page cache.
func TestTargetReadsTheDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new.img")
	target := openTarget(t, path, TargetOptions{Size: 1 << 20, Buffered: true})

	if _, err := target.WriteAt(random(1<<20, 1), 0); err != nil {
		t.Fatal(err)
	}

	if !resident(t, path) {
		t.Fatal("a buffered write left nothing in the page cache: this test sees nothing")
	}

	if err := target.dropCache(1000, 1); err != nil {
		t.Fatal(err)
	}

	if resident(t, path) {
		t.Error("the pages are still in the page cache, and ReadAt would read them")
	}
}

// TestTargetReadsTheDeviceAsItIs changes the file under a loop device behind the back
// of the device's page cache.
func TestTargetReadsTheDeviceAsItIs(t *testing.T) {
	for _, buffered := range []bool{false, true} {
		path := tempFile(t, make([]byte, 1<<20))
		target := openTarget(t, loop(t, path), TargetOptions{Size: 1 << 20, Buffered: buffered})
		p := random(4096, 1)

		if _, err := target.WriteAt(p, 8192); err != nil {
			t.Fatal(err)
		}

		if err := target.Sync(); err != nil {
			t.Fatal(err)
		}

		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}

		if _, err := f.WriteAt([]byte{p[100] ^ 0xff}, 8192+100); err != nil {
			t.Fatal(err)
		}

		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}

		got := AlignedBuffer(4096)
		if _, err := target.ReadAt(got, 8192); err != nil {
			t.Fatal(err)
		}

		if bytes.Equal(got, p) {
			t.Errorf("buffered %v: ReadAt gave what was written, not what the disk holds", buffered)
		}
	}
}

// TestTargetReadsBeforeFit: whoever looks before it decides sees what Fit will leave, and
// leaves the file as it is.
func TestTargetReadsBeforeFit(t *testing.T) {
	const size = 1<<20 + 100

	for _, had := range []int64{0, 1, 300_001, 512 << 10, size - 1, size, size + 1, 3 << 20} {
		for _, buffered := range []bool{false, true} {
			old := random(had, 7)
			path := tempFile(t, old)
			target := openTarget(t, path, TargetOptions{Size: size, Keep: true, Buffered: buffered})

			want := make([]byte, size)
			copy(want, old)
			checkReads(t, target, want)

			if info, err := os.Stat(path); err != nil || info.Size() != had {
				t.Fatalf("%d bytes: reading left %v, %v", had, info.Size(), err)
			}

			if err := target.Fit(); err != nil {
				t.Fatal(err)
			}

			checkReads(t, target, want)
		}
	}
}

func TestTargetRefusals(t *testing.T) {
	if _, err := OpenTarget("/dev/varve-no-such-device", TargetOptions{Size: 1}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing device = %v", err)
	}

	if _, err := os.Stat("/dev/varve-no-such-device"); err == nil {
		t.Error("a file was made in /dev")
	}

	if _, err := OpenTarget(filepath.Join(t.TempDir(), "x"), TargetOptions{Size: -1}); err == nil {
		t.Error("a negative size was accepted")
	}

	if _, err := OpenTarget(filepath.Join(t.TempDir(), "none", "x"), TargetOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory = %v", err)
	}

	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("gone.img", link); err != nil {
		t.Fatal(err)
	}

	if _, err := OpenTarget(link, TargetOptions{}); !errors.Is(err, ErrNotADisk) || !strings.Contains(err.Error(), "symbolic link to gone.img") {
		t.Errorf("a link to nothing = %v", err)
	}

	huge := filepath.Join(t.TempDir(), "huge")
	if _, err := OpenTarget(huge, TargetOptions{Size: 1<<63 - 1}); err == nil {
		t.Error("a file of 8 EiB was made")
	} else if _, err := os.Stat(huge); err == nil {
		t.Error("the file of a failed opening is left over")
	}

	target := openTarget(t, filepath.Join(t.TempDir(), "x"), TargetOptions{Size: 1000})
	for _, c := range [][2]int64{{-1, 1}, {1000, 1}, {999, 2}, {1 << 62, 1 << 62}} {
		if err := target.ZeroRange(c[0], c[1]); err == nil {
			t.Errorf("ZeroRange%v was accepted", c)
		}

		if _, err := target.WriteAt(make([]byte, min(c[1], 10)), c[0]); err == nil {
			t.Errorf("WriteAt%v was accepted", c)
		}
	}

	device := loop(t, tempFile(t, make([]byte, 1<<20)))
	for _, force := range []bool{false, true} {
		if _, err := OpenTarget(device, TargetOptions{Size: 1<<20 + 1, Force: force}); !errors.Is(err, ErrTooSmall) {
			t.Errorf("a device that is too small = %v, want %v", err, ErrTooSmall)
		}
	}

	openTarget(t, device, TargetOptions{Size: 1<<20 - 512})
}

// TestTargetIsLocked: two who write to one file at once leave neither's bytes.
func TestTargetIsLocked(t *testing.T) {
	old := random(5000, 1)
	path := tempFile(t, old)
	first := openTarget(t, path, TargetOptions{Size: 3000, Keep: true})

	for _, keep := range []bool{false, true} {
		_, err := OpenTarget(path, TargetOptions{Size: 1000, Keep: keep})

		var used *InUseError
		if !errors.As(err, &used) || used.Uses[0].Kind != Locked || !strings.Contains(err.Error(), path) {
			t.Errorf("keep %v: %v", keep, err)
		}
	}

	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, old) {
		t.Errorf("the file was changed: %v", err)
	}

	forced := openTarget(t, path, TargetOptions{Size: 3000, Keep: true, Force: true})
	if err := errors.Join(forced.Close(), first.Close()); err != nil {
		t.Fatal(err)
	}

	fresh := filepath.Join(t.TempDir(), "new.img")
	openTarget(t, fresh, TargetOptions{Size: 1000})

	if _, err := OpenTarget(fresh, TargetOptions{Size: 1000}); !errors.Is(err, ErrMounted) {
		t.Errorf("a file that was just made: %v", err)
	}

	openTarget(t, path, TargetOptions{Size: 3000, Keep: true})
}

func TestTargetRemoveUnused(t *testing.T) {
	dir := t.TempDir()

	for name, c := range map[string]struct {
		begin func(*Target) error
		stays bool
	}{
		"unused":  {func(*Target) error { return nil }, false},
		"fitted":  {(*Target).Fit, true},
		"written": {func(t *Target) error { _, err := t.WriteAt([]byte{1}, 0); return err }, true},
		"another": {func(t *Target) error {
			return errors.Join(os.Rename(t.Path(), t.Path()+".old"), os.WriteFile(t.Path(), nil, 0o600))
		}, true},
	} {
		path := filepath.Join(dir, name)
		target := openTarget(t, path, TargetOptions{Size: 1000, Keep: true})

		if err := errors.Join(c.begin(target), target.RemoveUnused()); err != nil {
			t.Fatal(err)
		}

		if _, err := os.Stat(path); (err == nil) != c.stays {
			t.Errorf("%s: %v", name, err)
		}
	}

	old := tempFile(t, nil)
	if err := openTarget(t, old, TargetOptions{Size: 1000, Keep: true}).RemoveUnused(); err != nil {
		t.Fatal(err)
	}

	if _, err := os.Stat(old); err != nil {
		t.Errorf("an empty file that was there: %v", err)
	}
}

func TestTargetReadOnlyDevice(t *testing.T) {
	device := loop(t, tempFile(t, make([]byte, 1<<20)), "-r")

	if _, err := OpenTarget(device, TargetOptions{Size: 1 << 20}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("OpenTarget of a write-protected device = %v, want %v", err, ErrReadOnly)
	}
}

func TestTargetIdentity(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	a := openTarget(t, path, TargetOptions{Size: 1000})
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}

	again := openTarget(t, path, TargetOptions{Size: 1000, Keep: true})
	b := openTarget(t, filepath.Join(dir, "b"), TargetOptions{Size: 1000})

	if a.Identity() != again.Identity() || a.Identity() == b.Identity() || a.Identity() == "" {
		t.Errorf("identities: %q, again %q, another file %q", a.Identity(), again.Identity(), b.Identity())
	}

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}

	if anew := openTarget(t, path, TargetOptions{Size: 1000}); anew.Identity() == a.Identity() {
		t.Errorf("a new file of the same name has the identity of the old one: %q", a.Identity())
	}

	image1, image2 := tempFile(t, make([]byte, 1<<20)), tempFile(t, make([]byte, 1<<20))
	c := openTarget(t, loop(t, image1), TargetOptions{Size: 1 << 20})
	d := openTarget(t, loop(t, image2), TargetOptions{Size: 1 << 20})

	if c.Identity() == d.Identity() {
		t.Errorf("two devices have the identity %q", c.Identity())
	}
}

// TestTargetConcurrentEdges writes neighbouring unaligned pieces at once: no write may
// undo another's.
func TestTargetConcurrentEdges(t *testing.T) {
	const size, piece = 1 << 20, 5000

	path := tempFile(t, make([]byte, size))
	target := openTarget(t, path, TargetOptions{Size: size, Keep: true})
	want := random(size, 5)
	errs := make(chan error)

	const writers = 4
	for w := range writers {
		go func() {
			var err error
			for at := w * piece; at < size && err == nil; at += writers * piece {
				_, err = target.WriteAt(want[at:min(at+piece, size)], int64(at))
			}

			errs <- err
		}()
	}

	for range writers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}

	checkReads(t, target, want)
}

package disk

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/mounttest"
)

// random returns n bytes that hardly repeat.
func random(n int64, seed uint64) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), 1}).Read(p) // never fails
	return p
}

func tempFile(t *testing.T, content []byte) string {
	t.Helper()

	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// loop attaches a loop device to a file and returns its name.
func loop(t *testing.T, file string, options ...string) string {
	t.Helper()
	needRoot(t)
	lockLoops(t)

	out, err := exec.Command("losetup", append(append([]string{"--show", "-f"}, options...), file)...).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}

	device := strings.TrimSpace(string(out))

	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", device).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v: %s", device, err, out)
		}
	})
	return device
}

// lockLoops keeps tests of other packages and processes from taking the few loop
// devices at the same time. The lock is released after the device, by order of cleanup.
func lockLoops(t *testing.T) {
	t.Helper()

	if loopsLocked == t {
		return
	}

	f, err := os.OpenFile(filepath.Join(os.TempDir(), "varve-loop-devices.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}

	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}

	loopsLocked = t

	t.Cleanup(func() {
		loopsLocked = nil
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

// loopsLocked is the test that holds the lock; these tests are not parallel.
var loopsLocked *testing.T

func needRoot(t *testing.T) {
	t.Helper()

	if os.Geteuid() != 0 {
		t.Skip("loop devices and mounts need root")
	}

	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skipf("no loop devices here: %v", err)
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()

	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// mountAt mounts a device for the rest of the test.
func mountAt(t *testing.T, device string, options ...string) string {
	t.Helper()

	point := filepath.Join(t.TempDir(), "with space")
	if err := os.Mkdir(point, 0o700); err != nil {
		t.Fatal(err)
	}

	run(t, "mount", append(options, device, point)...)
	t.Cleanup(func() { mounttest.Unmount(t, point) })
	return point
}

func openSource(t *testing.T, path string, o Options) *Source {
	t.Helper()

	s, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func openTarget(t *testing.T, path string, o TargetOptions) *Target {
	t.Helper()

	target, err := OpenTarget(path, o)
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

// checkReads compares ReadAt with the content, whole and in random pieces.
func checkReads(t *testing.T, r io.ReaderAt, want []byte) {
	t.Helper()

	got := make([]byte, len(want)+10)
	if n, err := r.ReadAt(got, 0); n != len(want) || !errors.Is(err, io.EOF) || !bytes.Equal(got[:n], want) {
		t.Fatalf("read to behind the end = %d, %v; want %d bytes and io.EOF", n, err, len(want))
	}

	if len(want) == 0 {
		return
	}

	dice := rand.New(rand.NewPCG(1, 2))
	memory := AlignedBuffer(len(want) + 64)

	for range 100 {
		offset := dice.IntN(len(want))
		length := 1 + dice.IntN(len(want)-offset)

		if dice.IntN(3) == 0 { // aligned
			offset &^= pageSize - 1
			length = min((length+pageSize-1)&^(pageSize-1), len(want)-offset)
		}

		p := memory[dice.IntN(2)*dice.IntN(64):][:length]
		if n, err := r.ReadAt(p, int64(offset)); n != length || err != nil && !errors.Is(err, io.EOF) {
			t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", length, offset, n, err)
		}

		if !bytes.Equal(p, want[offset:offset+length]) {
			t.Fatalf("ReadAt(%d bytes, %d): other bytes than the disk's", length, offset)
		}
	}
}

// loopSizes are sizes of image files, with those of devices made of them: whole
// sectors of 512 bytes.
var loopSizes = []int64{512, 4096, 4096 + 512, 1<<20 - 512, 1 << 20, 3<<20 + 4096}

var sectorSizes = []int64{512, 4096}

func sectorOption(size int64) string { return "--sector-size=" + strconv.FormatInt(size, 10) }

// resident reports whether any page of a file is in the page cache.
func resident(t *testing.T, path string) bool {
	t.Helper()

	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}

	defer func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}()

	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}

	m, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}

	defer func() {
		if err := unix.Munmap(m); err != nil {
			t.Error(err)
		}
	}()

	pages := make([]byte, (len(m)+os.Getpagesize()-1)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, addressOf(m), uintptr(len(m)), addressOf(pages)); errno != 0 {
		t.Fatal(errno)
	}

	for _, page := range pages {
		if page&1 != 0 {
			return true
		}
	}
	return false
}

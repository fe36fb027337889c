//go:build linux

// Package diskfstest compares a diskfs.FileSystem with the Linux kernel's own view
// of the same image. It serves the tests of every format.
package diskfstest

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/mounttest"
)

// NeedRoot skips a test that mounts file systems where it cannot.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting an image needs root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skipf("mounting an image needs loop devices: %v", err)
	}
}

// NeedTool skips a test where a program is missing.
func NeedTool(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
}

// Run runs a program and gives its standard output; the test ends where it fails.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	var errs strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, errs.String())
	}
	return string(out)
}

// imageDir makes a directory for an image, in memory if there is room: kernels write
// images in whole at unmount, which takes long on a disk.
func imageDir(t testing.TB) string {
	t.Helper()
	const memory = "/dev/shm"
	var st unix.Statfs_t
	if unix.Statfs(memory, &st) != nil || st.Bavail*uint64(st.Bsize) < 2<<30 {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(memory, "varve-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// NewImage makes a sparse file of size bytes that goes with the test.
func NewImage(t testing.TB, size int64) string {
	t.Helper()
	name := filepath.Join(imageDir(t), "disk.img")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return name
}

// CopyImage copies an image, keeping holes.
func CopyImage(t testing.TB, image string) string {
	t.Helper()
	to := filepath.Join(imageDir(t), "copy.img")
	Run(t, "cp", "--sparse=always", image, to)
	return to
}

// CopyInUse copies an image that is mounted, as it was at one moment: until a copy is equal to the image after it
// was made. The kernel writes changes to their places from time to time, and a copy of which one part is from
// before and another from after that is of no state that a power failure leaves.
func CopyInUse(t testing.TB, image string) string {
	t.Helper()
	to := CopyImage(t, image)
	for !equal(t, image, to) {
		Run(t, "cp", "--sparse=always", image, to)
	}
	return to
}

// equal reports whether two files of one size hold the same.
func equal(t testing.TB, a, b string) bool {
	t.Helper()
	var files [2]*os.File
	var parts [2][]byte
	for i, name := range []string{a, b} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i], parts[i] = f, make([]byte, 1<<20)
	}
	for {
		n, err := io.ReadFull(files[0], parts[0])
		m, _ := io.ReadFull(files[1], parts[1][:n])
		if !bytes.Equal(parts[0][:n], parts[1][:m]) {
			return false
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return true
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Open opens an image for reading; it is closed with the test.
func Open(t testing.TB, image string) (*os.File, int64) {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return f, st.Size()
}

// Mount mounts an image with the kernel, by a loop device, with options such as
// "ro". The loop device can be written even then, so a dirty journal is replayed into the
// image. The returned function unmounts; so does the test's end.
func Mount(t testing.TB, image, options string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	loop := strings.TrimSpace(Run(t, "losetup", "--find", "--show", image))
	backing := backingFile(loop)
	attached, mounted := true, false
	unmount = func() {
		if mounted {
			mounted = false
			mounttest.Unmount(t, dir)
		}
		if attached {
			attached = false
			Run(t, "losetup", "--detach", loop)
			waitReleased(t, loop, backing)
		}
	}
	t.Cleanup(unmount)
	args := []string{loop, dir}
	if options != "" {
		args = append([]string{"-o", options}, args...)
	}
	Run(t, "mount", args...)
	mounted = true
	return dir, unmount
}

// backingFile is the path of a loop device's image, empty where it has none.
func backingFile(loop string) string {
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(loop), "loop/backing_file"))
	if err != nil {
		return "" // the kernel removes the file with the image
	}
	return strings.TrimSpace(string(b))
}

// waitReleased waits until a detached loop device has released its image. A container that
// starts at the time of an umount holds the mount for a moment longer, in its own mount namespace,
// and the file system writes what it still has in memory only at the last umount.
func waitReleased(t testing.TB, loop, image string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Minute); image != "" && backingFile(loop) == image; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s still has %s ten minutes after it was unmounted", loop, image)
		}
	}
}

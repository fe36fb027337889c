package hydrate

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/mounttest"
)

// TestMain is also the process that TestKill kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv("HYDRATE_TEST_CHILD"); dir != "" {
		fmt.Fprintln(os.Stderr, child(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const childSize = 300*unit + 99

// child hydrates with a sync after every few units, and prints each on stdout.
func child(dir string) error {
	c, err := New(Options{Dir: dir, Keep: true})
	if err != nil {
		return err
	}
	d, err := c.Open(newImage(childSize), "id", unit)
	if err != nil {
		return err
	}
	p := make([]byte, 3*unit)
	for off := int64(0); off < childSize; off += int64(len(p)) {
		if _, err := d.ReadAt(d.ctx, p[:min(int64(len(p)), childSize-off)], off); err != nil {
			return err
		}
		d.sync()
		fmt.Fprintln(os.Stdout, off)
	}
	return errors.New("nobody killed the process")
}

// A process killed during hydration leaves a copy that can be continued: what it synced is
// there, and all bytes are right.
func TestKill(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	src := newImage(childSize)
	for _, after := range []int{1, 20, 60} {
		dir := filepath.Join(t.TempDir(), "cache")
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "HYDRATE_TEST_CHILD="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		told := int64(0)
		for range after {
			if _, err := fmt.Fscan(out, &told); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()
		c, log := openCache(t, Options{Dir: dir, Keep: true})
		d := c.mustOpen(t, src, "id")
		if d.Known() < told {
			t.Errorf("%d bytes were synced, %d are known", told, d.Known())
		}
		same(t, d, src.data)
		if n := log.count("damaged"); n != 0 {
			t.Errorf("%d units are damaged", n)
		}
		if got := src.Size() - d.Known(); got != 0 {
			t.Errorf("%d bytes are still not known", got)
		}
		closed(t, d)
	}
}

// kept makes a complete copy and returns its directory.
func kept(t *testing.T, src *memory) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "cache")
	c, _ := openCache(t, Options{Dir: dir, Keep: true})
	d := c.mustOpen(t, src, "id")
	same(t, d, src.data)
	closed(t, d)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Whatever part of the map reached the disk, with any content, reads are right.
func TestTornMap(t *testing.T) {
	src := newImage(12 * unit)
	dir := kept(t, src)
	path := filepath.Join(dir, "id", "map")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n <= len(whole); n += 5 {
		for _, flip := range []bool{false, true} {
			torn := bytes.Clone(whole[:n])
			if flip && n > 0 {
				torn = bytes.Clone(whole)
				torn[n-1] ^= 0x40
			}
			if err := os.WriteFile(path, torn, 0o600); err != nil {
				t.Fatal(err)
			}
			c, _ := openCache(t, Options{Dir: dir, Keep: true})
			d := c.mustOpen(t, src, "id")
			if n == len(whole) && !flip && !d.Complete() {
				t.Error("the whole map does not tell all")
			}
			same(t, d, src.data)
			closed(t, d)
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Bytes that differ from what was written are detected, and read again.
func TestDamagedData(t *testing.T) {
	src := newImage(12 * unit)
	for _, damage := range []func(f *os.File) error{
		func(f *os.File) error { _, err := f.WriteAt([]byte{src.data[700] ^ 1}, 700); return err },
		func(f *os.File) error { return f.Truncate(5 * unit) },
		func(f *os.File) error { // as after a crash without the sync of data
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, src.Size())
		},
	} {
		dir := kept(t, src)
		f, err := os.OpenFile(filepath.Join(dir, "id", "data"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(damage(f), f.Close()); err != nil {
			t.Fatal(err)
		}
		c, log := openCache(t, Options{Dir: dir, Keep: true})
		d := c.mustOpen(t, src, "id")
		same(t, d, src.data)
		if log.count("damaged") == 0 {
			t.Error("nothing was noticed")
		}
		if !d.Complete() {
			t.Error("the damaged units did not arrive again")
		}
		closed(t, d)
	}
}

// Data is synced before the map lists it; a copy whose sync failed is not used any more.
func TestSyncOrderAndFailure(t *testing.T) {
	src := newImage(12 * unit)
	dir := filepath.Join(t.TempDir(), "cache")
	c, log := openCache(t, Options{Dir: dir, Keep: true})
	d := c.mustOpen(t, src, "id")
	same(t, d, src.data)
	head := int64(len(d.head.encode()))
	d.syncData = func() error {
		if st, err := d.log.file.Stat(); err != nil || st.Size() != head {
			t.Errorf("the map has %d bytes before the data is synced, %v", st.Size(), err)
		}
		return syscall.EIO
	}
	d.sync()
	if st, err := d.log.file.Stat(); err != nil || st.Size() != head {
		t.Errorf("the map tells of data that was not synced: %v", err)
	}
	if d.Complete() || d.Has(0, unit) || log.count("level=ERROR") != 1 {
		t.Error("a copy is used whose sync failed")
	}
	before := src.reads.Load()
	same(t, d, src.data)
	if src.reads.Load()-before != src.Size() {
		t.Error("not everything was read from the image")
	}
	closed(t, d)
	if _, err := os.Stat(filepath.Join(dir, "id")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the copy is kept: %v", err)
	}
	if st := c.Stats(); st.Bytes != 0 {
		t.Errorf("%+v", st)
	}
}

// A full file system: one line in the log, and all is read from the image.
func TestFileSystemFull(t *testing.T) {
	mnt := t.TempDir()
	if err := unix.Mount("none", mnt, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("a full file system needs a mount, and that root: %v", err)
	}
	t.Cleanup(func() { mounttest.Unmount(t, mnt) })
	src := newImage(60 * unit)
	c, log := openCache(t, Options{Dir: filepath.Join(mnt, "cache"), Keep: true})
	t.Cleanup(func() { _ = c.Close() })
	d := c.mustOpen(t, src, "id")
	d.Start()
	until(t, "it is full", func() bool { return log.count("no space left for") == 1 })
	same(t, d, src.data)
	same(t, d, src.data)
	if n := log.count("level=WARN"); n != 1 || d.broken.Load() || d.held.Load() == 0 {
		t.Errorf("%d lines, %d bytes held", n, d.held.Load())
	}
	closed(t, d)
	// What was stored is still used.
	d = c.mustOpen(t, src, "id")
	same(t, d, src.data)
	closed(t, d)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func FuzzMap(f *testing.F) {
	h := header{id: "an id", size: 20*unit + 5, unit: unit}
	l := &mapLog{}
	head := h.encode()
	b := bytes.Clone(head)
	l.seed = uint32(head[len(head)-4]) | uint32(head[len(head)-3])<<8 | uint32(head[len(head)-2])<<16 | uint32(head[len(head)-1])<<24
	for _, r := range []record{{unit: 3, count: 1, kind: kindData, sum: 77}, {unit: 4, count: 17, kind: kindZero}} {
		b = r.append(b, l.seed)
	}
	f.Add(b)
	f.Add(head)
	f.Add([]byte(strings.Repeat("x", 100)))
	f.Fuzz(func(t *testing.T, b []byte) {
		end, err := readMap(bytes.NewReader(b), h, func(r record) {
			if r.unit < 0 || r.count == 0 || r.unit+int64(r.count) > h.units() || r.kind == kindData && r.count != 1 {
				t.Errorf("record %+v", r)
			}
		})
		if err == nil && (end > int64(len(b)) || end < int64(len(head))) {
			t.Errorf("%d of %d bytes are valid", end, len(b))
		}
	})
}

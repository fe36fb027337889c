//go:build linux

package ntfs

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/mounttest"
)

// mount mounts a volume by ntfs-3g, through FUSE.
func mount(t testing.TB, image, options string) (dir string, unmount func()) {
	t.Helper()
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "ntfs-3g")
	dir = t.TempDir()
	diskfstest.Run(t, "ntfs-3g", "-o", options, image, dir)
	mounted := true
	unmount = func() {
		if mounted {
			mounted = false
			mounttest.Unmount(t, dir)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

// newVolume makes an empty volume.
func newVolume(t testing.TB, size int64, args ...string) string {
	t.Helper()
	diskfstest.NeedTool(t, "mkntfs")
	image := diskfstest.NewImage(t, size)
	diskfstest.Run(t, "mkntfs", append(args, "-q", "-Q", "-F", "-L", "MYLABEL ünïcode", image)...)
	return image
}

// writer makes files in a directory.
type writer struct {
	t   testing.TB
	dir string
	rnd *rand.ChaCha8
}

func newWriter(t testing.TB, dir string) *writer {
	return &writer{t, dir, rand.NewChaCha8([32]byte{9})}
}

func (w *writer) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *writer) path(name string) string { return filepath.Join(w.dir, name) }

func (w *writer) file(name string, size int) {
	w.t.Helper()
	b := make([]byte, size)
	_, _ = w.rnd.Read(b)
	w.text(name, b)
}

func (w *writer) text(name string, b []byte) {
	w.t.Helper()
	mtime := time.Unix(1700000000+int64(len(b)), 123456700)
	w.must(errors.Join(os.MkdirAll(filepath.Dir(w.path(name)), 0o755), os.WriteFile(w.path(name), b, 0o755),
		os.Chtimes(w.path(name), time.Unix(1600000000, 0), mtime)))
}

// basic fills a volume with what NTFS can hold; files is the size of its largest
// directory, big that of its largest file in bytes.
func (w *writer) basic(files int, big int) {
	w.t.Helper()
	// Around what a record holds itself, clusters, and compression units.
	for _, n := range []int{0, 1, 8, 300, 500, 600, 680, 690, 700, 710, 720, 800, 1024, 4095, 4096, 4097, 65536, 100000} {
		w.file(fmt.Sprintf("size-%d", n), n)
	}
	for _, name := range []string{"lower.txt", "UPPER.TXT", "with space", "ünïcode ☃ \U0001f600", strings.Repeat("long", 63) + "abc", strings.Repeat("☃", 255), "deep/er/est/file", ".hidden", "trailing."} {
		w.file(name, 100)
	}
	for i := range files {
		w.file(fmt.Sprintf("many/file number %d", i), 10)
	}
	w.must(os.Mkdir(w.path("empty"), 0o755))
	w.must(os.Link(w.path("size-100000"), w.path("deep/hard")))
	w.must(os.Link(w.path("size-100000"), w.path("deep/er/hard again")))
	w.must(os.Symlink("size-1", w.path("short link")))
	w.must(os.Symlink("/"+strings.Repeat("somewhere/", 200)+"ünïcode", w.path("long link")))
	w.file("big", big)

	f, err := os.Create(w.path("sparse"))
	w.must(err)
	for _, at := range []int64{0, 5 << 20, 40<<20 + 12345} {
		_, err := f.WriteAt([]byte("data in between"), at)
		w.must(err)
	}
	w.must(errors.Join(f.Truncate(44<<20), f.Close()))

	f, err = os.Create(w.path("holes only"))
	w.must(err)
	w.must(errors.Join(f.Truncate(3<<20), f.Close()))
}

// fragments writes two files in turns, so that neither lies in one piece: their runs fill
// more than one record.
func (w *writer) fragments(pieces int) {
	w.t.Helper()
	var files [2]*os.File
	for i := range files {
		f, err := os.Create(w.path(fmt.Sprintf("fragmented-%d", i)))
		w.must(err)
		files[i] = f
	}
	b := make([]byte, 4096)
	for i := range pieces {
		_, _ = w.rnd.Read(b)
		// Holes between them keep the driver from putting pieces together.
		_, err := files[i%2].WriteAt(b, int64(i/2)*65536)
		w.must(err)
	}
	w.must(errors.Join(files[0].Close(), files[1].Close()))
}

// streams gives files alternate data streams.
func (w *writer) streams() {
	w.t.Helper()
	w.file("with streams", 5000)
	w.must(unix.Setxattr(w.path("with streams"), "user.small", []byte("in the record"), 0))
	w.must(unix.Setxattr(w.path("with streams"), "user.large", []byte(strings.Repeat("0123456789", 3000)), 0))
	w.must(unix.Setxattr(w.path("empty"), "user.of a directory", []byte("x"), 0))
	for i := range 40 { // more than one record takes
		w.must(unix.Setxattr(w.path("with streams"), fmt.Sprintf("user.stream-%02d", i), []byte(strings.Repeat("v", 100)), 0))
	}
}

// compressed writes into a directory whose files are compressed.
func (w *writer) compressed() {
	w.t.Helper()
	dir := w.path("compressed")
	w.must(os.Mkdir(dir, 0o755))
	const compress = 0x800
	w.must(unix.Setxattr(dir, "system.ntfs_attrib_be", []byte{0, 0, compress >> 8, 0}, 0))
	var words strings.Builder
	for i := 0; words.Len() < 1<<20; i++ {
		fmt.Fprintf(&words, "%d bottles of %x on the wall\n", i, i*i)
	}
	text := []byte(words.String())
	w.text("compressed/words", text)
	w.text("compressed/few words", text[:5000])
	w.text("compressed/zeroes", make([]byte, 300000))
	w.file("compressed/random", 300000)
	mixed := append([]byte{}, text[:200000]...)
	_, _ = w.rnd.Read(mixed[70000:140000])
	clear(mixed[140000:])
	w.text("compressed/mixed", mixed)
}

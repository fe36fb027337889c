//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// fuzzImages makes small volumes to corrupt: without checksums, so that changes get
// past them, and with.
func fuzzImages(t testing.TB) [][]byte {
	t.Helper()
	diskfstest.NeedTool(t, "mke2fs")
	src := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name string, b []byte) { t.Helper(); must(os.WriteFile(filepath.Join(src, name), b, 0o644)) }
	for i := range 120 {
		write(strings.Repeat("f", 40)+string(rune('a'+i%26))+string(rune('a'+i/26)), []byte("x"))
	}
	must(os.Mkdir(filepath.Join(src, "dir"), 0o755))
	write("dir/file", bytes.Repeat([]byte("data"), 5000))
	write("inline", bytes.Repeat([]byte("i"), 100))
	must(os.Symlink(strings.Repeat("t", 100), filepath.Join(src, "slow")))
	must(os.Symlink("dir/file", filepath.Join(src, "fast")))
	sparse, err := os.Create(filepath.Join(src, "sparse"))
	must(err)
	for i := range 20 {
		_, err := sparse.WriteAt([]byte("piece"), int64(i)*20000)
		must(err)
	}
	must(sparse.Close())
	for i := range 6 { // where the test's directory has no attributes, images have none
		if err := unix.Setxattr(filepath.Join(src, "inline"), "user.attr"+string(rune('a'+i)), bytes.Repeat([]byte("v"), 30), 0); err != nil {
			t.Logf("no attributes in the images: %v", err)
			break
		}
	}
	var images [][]byte
	for _, args := range []string{
		"-t ext4 -b 1024 -I 256 -O ^metadata_csum,^has_journal,inline_data",
		"-t ext2 -b 1024 -I 128",
		"-t ext4 -b 1024 -O ^metadata_csum,^has_journal,bigalloc,ea_inode,large_dir",
		"-t ext4 -b 1024 -O metadata_csum,^has_journal",
		"-t ext4 -b 1024 -O ^metadata_csum,^64bit -J size=1",
		"-t ext4 -b 1024 -O metadata_csum -J size=1",
	} {
		image := diskfstest.NewImage(t, 3<<20)
		diskfstest.Run(t, "mke2fs", append(append([]string{"-q", "-F", "-N", "256", "-d", src}, strings.Fields(args)...), image)...)
		if !strings.Contains(args, "^has_journal") {
			diskfstest.NeedTool(t, "debugfs")
			script := filepath.Join(t.TempDir(), "script")
			body := filepath.Join(t.TempDir(), "body")
			must(os.WriteFile(body, bytes.Repeat([]byte("\xc0\x3b\x39\x98logged--"), 4096), 0o644))
			must(os.WriteFile(script, []byte("jo -c\njw -b 2000-2010 "+body+"\njw -r 2003-2005 /dev/null\njw -b 2004-2004 "+body+"\njc\n"), 0o644))
			diskfstest.Run(t, "debugfs", "-w", "-f", script, image)
		}
		if out, err := exec.Command("e2fsck", "-fyD", image).CombinedOutput(); err != nil && strings.Contains(args, "^has_journal") {
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() > 1 {
				t.Fatalf("index directories: %v\n%s", err, out)
			}
		}
		b, err := os.ReadFile(image)
		must(err)
		images = append(images, b)
	}
	return images
}

// corruption is an image with bytes changed: only chunks that are not all zero take
// part, since a change elsewhere is seldom seen.
type corruption struct {
	image  []byte
	chunks []int
}

const chunkSize = 16

func newCorruption(image []byte) *corruption {
	c := &corruption{image: bytes.Clone(image)}
	for at := 0; at+chunkSize <= len(image); at += chunkSize {
		if !bytes.Equal(image[at:at+chunkSize], make([]byte, chunkSize)) {
			c.chunks = append(c.chunks, at)
		}
	}
	return c
}

// apply changes the image as a script of four bytes each says (two choose a chunk,
// one a byte in it and how to change it, one the value), and gives what undoes it.
func (c *corruption) apply(script []byte) (undo func()) {
	type change struct {
		at  int
		old byte
	}
	var done []change
	for ; len(script) >= 4 && len(done) < 64; script = script[4:] {
		at := c.chunks[(int(script[0])<<8|int(script[1]))*7%len(c.chunks)] + int(script[2]&15)
		done = append(done, change{at, c.image[at]})
		switch script[2] >> 6 {
		case 0, 1:
			c.image[at] = script[3]
		case 2:
			c.image[at] ^= 1 << (script[3] & 7)
		case 3:
			c.image[at] += script[3]
		}
	}
	return func() {
		for i := len(done) - 1; i >= 0; i-- {
			c.image[done[i].at] = done[i].old
		}
	}
}

// exercise reads everything that an image offers, within limits: errors are fine, a
// panic or a name that must not get out is not.
func exercise(t testing.TB, r io.ReaderAt, size int64) {
	for _, stale := range []bool{false, true} {
		f, err := Open(r, size, diskfs.Options{Stale: stale})
		if err != nil {
			if f != nil {
				t.Error("a file system with an error")
			}
			continue
		}
		f.Info()
		fsys := diskfs.New(f)
		left, buf := 400, make([]byte, 64<<10)
		_ = fs.WalkDir(fsys, ".", func(name string, _ fs.DirEntry, err error) error {
			if left--; left < 0 {
				return fs.SkipAll
			}
			if !diskfs.ValidPath(name) {
				t.Errorf("path %q", name)
			}
			if strings.Count(name, "/") > 8 {
				return fs.SkipDir // a directory that holds itself
			}
			if err != nil {
				return nil
			}
			_, _ = fsys.Lstat(name)
			_, _ = fsys.Xattrs(name)
			_, _ = fsys.ReadLink(name)
			file, err := fsys.Open(name)
			if err != nil {
				return nil
			}
			if file, ok := file.(diskfs.File); ok {
				for _, off := range []int64{0, 1 << 20, 1 << 40} {
					_, _ = file.ReadAt(buf, off)
				}
				off := int64(0)
				for range 200 {
					e, err := file.NextData(off)
					if err != nil {
						break
					}
					if e.Length <= 0 || e.Offset < off {
						t.Errorf("NextData(%d) = %+v", off, e)
					}
					off = e.Offset + e.Length
				}
			}
			return nil
		})
		for ino := range uint64(64) {
			_, _ = f.Inode(ino)
		}
	}
}

// maxAllocated is many times what reading the images takes while they are sound.
const maxAllocated = 64 << 20

func FuzzImage(f *testing.F) {
	var images []*corruption
	for _, b := range fuzzImages(f) {
		images = append(images, newCorruption(b))
	}
	for i := range images {
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), []byte{0, 1, 2, 3, 4, 5, 6, 7})
	}
	f.Fuzz(func(t *testing.T, which uint8, script []byte) {
		c := images[int(which)%len(images)]
		defer c.apply(script)()
		diskfstest.Bounded(t, maxAllocated, func() { exercise(t, bytes.NewReader(c.image), int64(len(c.image))) })
	})
}

// TestCorruptImages corrupts images at random places, always the same ones.
func TestCorruptImages(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	for _, b := range fuzzImages(t) {
		c := newCorruption(b)
		for range rounds {
			script := make([]byte, 4*(1+rnd.IntN(20)))
			for i := range script {
				script[i] = byte(rnd.Uint32())
			}
			undo := c.apply(script)
			diskfstest.Bounded(t, maxAllocated, func() { exercise(t, bytes.NewReader(c.image), int64(len(c.image))) })
			undo()
		}
		if !bytes.Equal(c.image, b) {
			t.Fatal("corruption was not undone")
		}
	}
}

// TestTruncatedImages cuts images short; what is left must refuse.
func TestTruncatedImages(t *testing.T) {
	for _, b := range fuzzImages(t) {
		for _, n := range []int{0, 1, 1023, 1024, 2047, 2048, 4096, 65536, len(b) - 1024} {
			f, err := Open(bytes.NewReader(b[:n]), int64(n), diskfs.Options{})
			if err == nil || f != nil || !(errors.Is(err, diskfs.ErrCorrupt) || errors.Is(err, diskfs.ErrNotRecognised)) {
				t.Errorf("%d bytes: %v", n, err)
			}
			// A device that ends before its size says.
			exercise(t, bytes.NewReader(b[:n]), int64(len(b)))
		}
	}
}

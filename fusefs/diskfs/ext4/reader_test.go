//go:build linux

package ext4

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestWithoutMount compares volumes that this kernel cannot mount, or not with all
// features, with the directory that mke2fs made them of.
func TestWithoutMount(t *testing.T) {
	diskfstest.NeedRoot(t) // for owners and special files
	src := t.TempDir()
	populate(t, src, want{files: 100, old: true, near: true})
	for _, name := range []string{"far", "prealloc"} { // mke2fs takes long, or gets the size wrong
		if err := os.Remove(filepath.Join(src, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range []string{
		"-t ext4 -b 65536",
		"-t ext4 -b 65536 -O inline_data",
		"-t ext2 -b 32768",
		"-t ext4 -O casefold,encrypt -E encoding=utf8",
		"-t ext4 -b 32768 -C 131072 -O bigalloc",
	} {
		t.Run(args, func(t *testing.T) {
			image := diskfstest.NewImage(t, 192<<20)
			mkfs(t, image, append(strings.Fields(args), "-d", src)...)
			_, fsys := openImage(t, image)
			// mke2fs gives new inodes, places and times of change; it does not keep
			// nanoseconds, rewrites directories, and adds lost+found.
			n := diskfstest.Compare(t, fsys, src, diskfstest.Options{
				IgnoreIno: true, IgnoreBlocks: true, IgnoreData: true, IgnoreAtime: true,
				IgnoreCtime: true, WholeSeconds: true, IgnoreDirSize: true, IgnoreNlink: true, Skip: []string{".", "lost+found"},
			})
			t.Logf("%d entries compared", n)
		})
	}
}

// TestIOFS runs the standard library's test of file systems.
func TestIOFS(t *testing.T) {
	src := t.TempDir()
	for _, name := range []string{"a", "dir/b", "dir/sub/c"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(src, name)), 0o755),
			os.WriteFile(filepath.Join(src, name), bytes.Repeat([]byte(name), 3000), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	image := diskfstest.NewImage(t, 8<<20)
	mkfs(t, image, "-t", "ext4", "-d", src)
	_, fsys := openImage(t, image)
	if err := fstest.TestFS(fsys, "a", "dir/b", "dir/sub/c"); err != nil {
		t.Error(err)
	}
}

// TestPaths resolves paths as a process chrooted into the volume would.
func TestPaths(t *testing.T) {
	src := t.TempDir()
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(src, "dir/sub"), 0o755), os.WriteFile(filepath.Join(src, "dir/file"), []byte("file"), 0o644),
		os.Symlink("/dir/file", filepath.Join(src, "absolute")),
		os.Symlink("../../../../dir/file", filepath.Join(src, "dir/sub/up")),
		os.Symlink("dir", filepath.Join(src, "todir")),
		os.Symlink("loop2", filepath.Join(src, "loop1")), os.Symlink("loop1", filepath.Join(src, "loop2")),
		os.Symlink("/proc/self/environ", filepath.Join(src, "outside")),
		os.Symlink("dir/file/..", filepath.Join(src, "throughfile")))
	image := diskfstest.NewImage(t, 8<<20)
	mkfs(t, image, "-t", "ext4", "-d", src)
	_, fsys := openImage(t, image)
	for _, c := range []struct {
		name string
		want error
	}{
		{"dir/file", nil}, {"absolute", nil}, {"dir/sub/up", nil}, {"todir/file", nil}, {"todir/sub/up", nil},
		{"loop1", syscall.ELOOP}, {"outside", fs.ErrNotExist}, {"none", fs.ErrNotExist},
		{"dir/file/x", syscall.ENOTDIR}, {"throughfile", syscall.ENOTDIR},
		{"../etc", fs.ErrInvalid}, {"/dir", fs.ErrInvalid}, {"dir/", fs.ErrInvalid}, {"", fs.ErrInvalid}, {"dir//file", fs.ErrInvalid},
	} {
		b, err := fsys.ReadFile(c.name)
		if !errors.Is(err, c.want) || (c.want == nil && string(b) != "file") {
			t.Errorf("ReadFile(%q) = %q, %v; want %v", c.name, b, err, c.want)
		}
	}
	if info, err := fsys.Lstat("todir"); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("Lstat(todir) = %v, %v", info, err)
	}
	if info, err := fsys.Stat("todir"); err != nil || !info.IsDir() {
		t.Errorf("Stat(todir) = %v, %v", info, err)
	}
	if _, err := fsys.ReadFile("dir"); !errors.Is(err, syscall.EISDIR) {
		t.Errorf("ReadFile(dir): %v", err)
	}
	if _, err := fsys.ReadLink("dir"); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("ReadLink(dir): %v", err)
	}
}

// countingReader counts what is read.
type countingReader struct {
	r     io.ReaderAt
	bytes atomic.Int64
}

func (c *countingReader) ReadAt(p []byte, off int64) (int, error) {
	c.bytes.Add(int64(len(p)))
	return c.r.ReadAt(p, off)
}

// TestLazy bounds what is read of a 1 TiB volume to show its root, and of a large
// directory to open all its files.
func TestLazy(t *testing.T) {
	if testing.Short() {
		t.Skip("makes a volume of 1 TiB")
	}
	src := t.TempDir()
	const files = 5000
	for i := range files {
		if err := os.WriteFile(filepath.Join(src, fmt.Sprintf("file-%d", i)), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for index, size := range map[string]int64{"dir_index": 1 << 40, "^dir_index": 1 << 30} {
		image := diskfstest.NewImage(t, size)
		mkfs(t, image, "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", "-C", "65536", "-O", "bigalloc,"+index, "-d", src)
		r, size := diskfstest.Open(t, image)
		counting := &countingReader{r: r}
		f, err := Open(counting, size, diskfs.Options{})
		if err != nil {
			t.Fatal(err)
		}
		fsys := diskfs.New(f)
		entries, err := fsys.ReadDir(".")
		if err != nil || len(entries) != files+1 {
			t.Fatalf("%d entries, %v", len(entries), err)
		}
		if n := counting.bytes.Load(); n > 1<<20 {
			t.Errorf("%s: %d bytes read to list the root", index, n)
		}
		for _, e := range entries {
			if e.IsDir() {
				continue
			}
			if b, err := fsys.ReadFile(e.Name()); err != nil || string(b) != "x" {
				t.Fatalf("%s: %q, %v", e.Name(), b, err)
			}
		}
		// Each block of metadata once, and a byte of each file.
		if n := counting.bytes.Load(); n > 4<<20 {
			t.Errorf("%s: %d bytes read to open %d files", index, n, files)
		}
		t.Logf("%s: %d bytes read", index, counting.bytes.Load())
	}
}

// TestConcurrentReaders reads one file and one directory from many goroutines.
func TestConcurrentReaders(t *testing.T) {
	src := t.TempDir()
	content := make([]byte, 3<<20)
	for i := range content {
		content[i] = byte(i * i >> 7)
	}
	if err := os.WriteFile(filepath.Join(src, "file"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	image := diskfstest.NewImage(t, 32<<20)
	mkfs(t, image, "-t", "ext2", "-b", "1024", "-d", src)
	_, fsys := openImage(t, image)
	file, err := fsys.Open("file")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			buf := make([]byte, 7777)
			for off := int64(g * 1000); off < int64(len(content)); off += 77777 {
				n, err := file.(io.ReaderAt).ReadAt(buf, off)
				if err != nil && !errors.Is(err, io.EOF) {
					t.Error(err)
					return
				}
				if !bytes.Equal(buf[:n], content[off:off+int64(n)]) {
					t.Errorf("wrong bytes at %d", off)
				}
			}
			if b, err := fsys.ReadFile("file"); err != nil || sha256.Sum256(b) != sha256.Sum256(content) {
				t.Errorf("ReadFile: %d bytes, %v", len(b), err)
			}
		})
	}
	wg.Wait()
}

// TestHashes compares hashes of names with debugfs.
func TestHashes(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	for version, name := range map[uint8]string{hashLegacy: "legacy", hashHalfMD4: "half_md4", hashTEA: "tea"} {
		for _, file := range []string{"a", "abcd", "lost+found", strings.Repeat("x", 31), strings.Repeat("y", 32), strings.Repeat("long", 60), "caf\xc3\xa9-\xff\x80"} {
			out := diskfstest.Run(t, "debugfs", "-R", fmt.Sprintf("dx_hash -h %s -s 6f0fa5a0-53c1-4b3e-a4b1-1234567890ab %s", name, file))
			var want uint32
			if _, err := fmt.Sscanf(out[strings.Index(out, " is ")+4:], "%v", &want); err != nil {
				t.Fatalf("%q: %v", out, err)
			}
			// As stored in a superblock: the bytes of the UUID.
			sb := &superblock{flags: sbFlagSignedHash, hashSeed: [4]uint32{0xa0a50f6f, 0x3e4bc153, 0x3412b1a4, 0xab907856}}
			got, ok := sb.hashName(version, file)
			unsigned, _ := sb.hashName(version+hashUnsigned, file)
			if !ok || got != want && unsigned != want {
				t.Errorf("%s(%q) = %#x or %#x, debugfs %#x", name, file, got, unsigned, want)
			}
		}
	}
}

// TestUnknownFeatures names each incompatible feature that is refused.
func TestUnknownFeatures(t *testing.T) {
	image := diskfstest.NewImage(t, 8<<20)
	mkfs(t, image, "-t", "ext4", "-O", "^metadata_csum")
	base, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for bit := range 32 {
		feature := uint32(1) << bit
		if incompatSupported&feature != 0 {
			continue
		}
		b := bytes.Clone(base)
		at := superblockOffset + 0x60
		le.PutUint32(b[at:], le.Uint32(b[at:])|feature)
		_, err := Open(bytes.NewReader(b), int64(len(b)), diskfs.Options{})
		name := incompatNames[bit]
		if name == "" {
			name = fmt.Sprintf("%#x", feature)
		}
		if !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), name) {
			t.Errorf("feature %#x: %v", feature, err)
		}
	}
}

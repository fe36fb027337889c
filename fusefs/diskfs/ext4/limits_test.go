//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestHighBlocks reads a volume of more than 2^32 blocks, with directories, files, trees and
// attributes behind them, as it is at rest and as a crash leaves it.
func TestHighBlocks(t *testing.T) {
	diskfstest.NeedRoot(t)
	const (
		high          = int64(1) << 32 * 4096
		bytesPerInode = 1 << 20
	)
	image := diskfstest.NewImage(t, high+high/2)
	mkfs(t, image, "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", "-J", "size=4", "-i", strconv.Itoa(bytesPerInode), "-O", "^resize_inode")
	dir, unmount := diskfstest.Mount(t, image, "noinit_itable")
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	fill := func(n int) {
		// Inodes come from the goal's group. Blocks come from near their inode only if the file counts as
		// small: for others the kernel begins at the first group whose bitmap it has read.
		var at unix.Stat_t
		must(unix.Stat(dir, &at))
		name, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(at.Dev), unix.Minor(at.Dev)))
		must(err)
		settings := filepath.Join("/sys/fs/ext4", filepath.Base(name))
		must(os.WriteFile(filepath.Join(settings, "inode_goal"), fmt.Append(nil, (high+high/4)/bytesPerInode), 0o644),
			os.WriteFile(filepath.Join(settings, "mb_stream_req"), []byte("4096"), 0o644))
		for i := range 24 {
			sub := filepath.Join(dir, fmt.Sprintf("d%d-%d", n, i))
			must(os.Mkdir(sub, 0o755))
			for k := range 60 {
				must(os.WriteFile(filepath.Join(sub, fmt.Sprintf("%s%d", strings.Repeat("n", 100), k)), fmt.Appendf(nil, "%d %d", i, k), 0o644))
			}
			f, err := os.Create(filepath.Join(sub, "pieces"))
			must(err)
			for k := range int64(10) {
				_, err := f.WriteAt(bytes.Repeat([]byte{byte(i), byte(k)}, 2048), k*8192)
				must(err)
			}
			must(f.Sync(), f.Close(), os.Symlink(strings.Repeat("t", 500), filepath.Join(sub, "link")))
		}
	}
	behind := func(f *FS) (n int) {
		fsys := diskfs.New(f)
		entries, err := fsys.ReadDir(".")
		must(err)
		for _, e := range entries {
			file, err := fsys.Open(e.Name() + "/pieces")
			if err != nil {
				continue // lost+found
			}
			x, err := file.(diskfs.File).NextData(0)
			must(err)
			if x.Device >= high {
				n++
			}
		}
		return n
	}
	fill(0)
	unmount()
	if n := behind(compareWithKernel(t, image, image, diskfstest.Options{})); n == 0 {
		t.Error("no file lies behind 2^32 blocks: the test proves nothing")
	}

	dir, unmount = diskfstest.Mount(t, image, "noinit_itable")
	fill(1)
	shutdown(t, dir, shutdownLogFlush)
	unmount()
	f := compareWithKernel(t, image, diskfstest.CopyImage(t, image), diskfstest.Options{})
	logged := 0
	for block := range f.dev.over {
		if block >= 1<<32 {
			logged++
		}
	}
	if f.Info().Log != diskfs.LogReplayed || logged == 0 {
		t.Errorf("log %v, %d blocks behind 2^32 in it: the test proves nothing", f.Info().Log, logged)
	}
}

// TestDeepestExtents reads a file through an extent tree of each depth that the format
// allows. No file needs the deepest; so the levels are put in by hand, one entry each.
func TestDeepestExtents(t *testing.T) {
	diskfstest.NeedRoot(t)
	src := t.TempDir()
	var content []byte
	for i := range 20 {
		content = append(content, bytes.Repeat([]byte{byte('a' + i)}, 1024)...)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(src, "file"), content, 0o644),
		os.WriteFile(filepath.Join(src, "spare"), bytes.Repeat([]byte("s"), 8*1024), 0o644)); err != nil {
		t.Fatal(err)
	}
	for i := range 100 { // for compareWithKernel
		if err := os.WriteFile(filepath.Join(src, fmt.Sprint(i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const head, entry = 12, 12
	for depth := 1; depth <= 6; depth++ {
		image := diskfstest.NewImage(t, 16<<20)
		mkfs(t, image, "-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^has_journal", "-d", src)
		f, fsys := openImage(t, image)
		st, err := fsys.Lstat("file")
		if err != nil {
			t.Fatal(err)
		}
		n, err := f.inode(st.Sys().(*diskfs.Stat).Ino)
		if err != nil {
			t.Fatal(err)
		}
		spare, err := fsys.Open("spare")
		if err != nil {
			t.Fatal(err)
		}
		x, err := spare.(diskfs.File).NextData(0)
		if err != nil || x.Length != 8*1024 {
			t.Fatalf("%+v, %v", x, err)
		}
		level := func(entries, limit, depth int) []byte {
			b := le.AppendUint16(nil, 0xf30a)
			for _, v := range []int{entries, limit, depth, 0, 0} {
				b = le.AppendUint16(b, uint16(v))
			}
			return b
		}
		index := func(block int64) []byte { // from file block 0 on
			b := le.AppendUint32(le.AppendUint32(nil, 0), uint32(block))
			return append(b, 0, 0, 0, 0)
		}
		root := bytes.Clone(n.block60())
		entries := int(le.Uint16(root[2:]))
		if le.Uint16(root[6:]) != 0 {
			t.Fatalf("the tree has %d levels already", le.Uint16(root[6:]))
		}
		disk, err := os.OpenFile(image, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		write := func(b []byte, at int64) {
			t.Helper()
			if _, err := disk.WriteAt(b, at); err != nil {
				t.Fatal(err)
			}
		}
		first := x.Device / 1024
		for d := range depth {
			b := level(1, (1024-head)/entry, d)
			if d == 0 {
				b = append(level(entries, (1024-head)/entry, 0), root[head:head+entries*entry]...)
			} else {
				b = append(b, index(first+int64(d)-1)...)
			}
			write(append(b, make([]byte, 1024-len(b))...), x.Device+int64(d)*1024)
		}
		table, err := f.groups.inodeTable(0)
		if err != nil {
			t.Fatal(err)
		}
		b := append(level(1, 4, depth), index(first+int64(depth)-1)...)
		write(append(b, make([]byte, iBlockLen-len(b))...), int64(table)*1024+int64(n.ino-1)*int64(f.sb.inodeSize)+iBlock)
		if err := disk.Close(); err != nil {
			t.Fatal(err)
		}
		_, fsys = openImage(t, image)
		got, err := fsys.ReadFile("file")
		if depth > 5 {
			if !errors.Is(err, diskfs.ErrCorrupt) {
				t.Errorf("depth %d: %d bytes, %v", depth, len(got), err)
			}
			continue
		}
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("depth %d: %d bytes, %v", depth, len(got), err)
		}
		compareWithKernel(t, image, image, diskfstest.Options{})
	}
}

// TestOrphans reads a volume that a crash left with files to be truncated and removed, which
// a mount does.
func TestOrphans(t *testing.T) {
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "debugfs")
	src := t.TempDir()
	for i := range 100 {
		if err := os.WriteFile(filepath.Join(src, fmt.Sprint(i)), bytes.Repeat([]byte{byte(i + 1)}, 30_000), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range []string{"-t ext4 -O ^orphan_file,^metadata_csum", "-t ext3", "-t ext4 -O ^orphan_file,^metadata_csum,inline_data"} {
		image := diskfstest.NewImage(t, 32<<20)
		mkfs(t, image, append(strings.Fields(args), "-d", src)...)
		_, fsys := openImage(t, image)
		number := func(name string) uint64 {
			st, err := fsys.Lstat(name)
			if err != nil {
				t.Fatal(err)
			}
			return st.Sys().(*diskfs.Stat).Ino
		}
		// The list goes from the superblock through the times of deletion: 1 to be cut in the
		// middle of a block, 2 to nothing, 3 to be removed.
		script := filepath.Join(t.TempDir(), "script")
		text := fmt.Sprintf("ssv last_orphan %d\nsif /1 size 10001\nsif /1 dtime %d\nsif /2 size 0\nsif /2 dtime %d\nsif <%d> links_count 0\nsif <%d> dtime 0\nunlink /3\n",
			number("1"), number("2"), number("3"), number("3"), number("3"))
		if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		diskfstest.Run(t, "debugfs", "-w", "-f", script, image)
		mounted := diskfstest.CopyImage(t, image)
		// The kernel frees what is cut off, as of now.
		_, fsys = openImage(t, image)
		dir, unmount := diskfstest.Mount(t, mounted, "ro")
		diskfstest.Compare(t, fsys, dir, diskfstest.Options{Skip: []string{"1", "2"}})
		for name, size := range map[string]int{"1": 10001, "2": 0} {
			want, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil || len(want) != size {
				t.Errorf("%s: the kernel shows %d bytes of %s, %v", args, len(want), name, err)
			}
			if got, err := fsys.ReadFile(name); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %s has %d bytes, %v", args, name, len(got), err)
			}
		}
		unmount()
		out := diskfstest.Run(t, "dumpe2fs", "-h", mounted)
		if strings.Contains(out, "orphan inode:") {
			t.Errorf("%s: the kernel did not go through the list:\n%s", args, out)
		}
	}
}

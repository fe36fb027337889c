package xfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// Kernels without version 4 or without case-insensitive names cannot be the witness for
// those; mkfs.xfs can fill a file system from a description, which is known then, and
// xfs_db reads it.

// protoTree is a description for mkfs.xfs -p and what it should give: content, target
// or device by path, and the mode.
type protoTree struct {
	text  strings.Builder
	want  map[string]protoFile
	files string // directory with the contents
}

type protoFile struct {
	mode    uint32
	content string
	rdev    [2]uint32
}

func newProtoTree(t testing.TB) *protoTree {
	p := &protoTree{want: map[string]protoFile{}, files: t.TempDir()}
	fmt.Fprintf(&p.text, "dummy\n0 0\nd--755 7 8\n")
	return p
}

func (p *protoTree) file(t testing.TB, dir, name, content string) {
	t.Helper()
	src := filepath.Join(p.files, fmt.Sprint(len(p.want)))
	if err := os.WriteFile(src, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&p.text, "%s -u-640 1000 70000 %s\n", name, src)
	p.want[filepath.Join(dir, name)] = protoFile{mode: unix.S_IFREG | unix.S_ISUID | 0o640, content: content}
}

func (p *protoTree) link(dir, name, target string) {
	fmt.Fprintf(&p.text, "%s l--777 0 0 %s\n", name, target)
	p.want[filepath.Join(dir, name)] = protoFile{mode: unix.S_IFLNK | 0o777, content: target}
}

func (p *protoTree) device(dir, name string, major, minor uint32) {
	fmt.Fprintf(&p.text, "%s b--600 0 0 %d %d\n", name, major, minor)
	p.want[filepath.Join(dir, name)] = protoFile{mode: unix.S_IFBLK | 0o600, rdev: [2]uint32{major, minor}}
}

func (p *protoTree) dir(name string, fill func()) {
	fmt.Fprintf(&p.text, "%s d--755 5 6\n", name)
	p.want[name] = protoFile{mode: unix.S_IFDIR | 0o755}
	fill()
	fmt.Fprintf(&p.text, "$\n")
}

func (p *protoTree) fill(t testing.TB, longLinks bool) {
	p.file(t, ".", "empty", "")
	p.file(t, ".", "small", "small\n")
	p.file(t, ".", "big", strings.Repeat("0123456789abcdef", 20_001))
	p.link(".", "short", "target")
	if longLinks { // mkfs.xfs 6.1 forgets the headers that version 5 has
		p.link(".", "long", strings.Repeat("l", 1000))
	}
	p.device(".", "disk", 8, 300)
	for _, n := range []int{1, 3, 30, 500, 3000} {
		dir := fmt.Sprintf("dir%d", n)
		p.dir(dir, func() {
			for i := range n {
				p.link(dir, fmt.Sprintf("Name-%d-%s", i, strings.Repeat("q", i%90)), "x")
			}
		})
	}
	p.text.WriteString("$\n")
}

func TestProto(t *testing.T) {
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Skip("needs mkfs.xfs (package xfsprogs)")
	}
	for _, c := range []struct {
		name string
		mkfs []string
		v4   bool
	}{
		{"version 4", []string{"-m", "crc=0"}, true},
		{"version 4 without ftype", []string{"-m", "crc=0", "-n", "ftype=0", "-i", "attr=1"}, true},
		{"version 4, 1k blocks, 256-byte inodes", []string{"-m", "crc=0", "-b", "size=1024", "-i", "size=256", "-l", "version=1"}, true},
		{"version 4, 512-byte blocks, 4k directories", []string{"-m", "crc=0", "-b", "size=512", "-n", "size=4096"}, true},
		{"case-insensitive", []string{"-n", "version=ci"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newProtoTree(t)
			p.fill(t, c.v4)
			proto := filepath.Join(p.files, "proto")
			if err := os.WriteFile(proto, []byte(p.text.String()), 0o600); err != nil {
				t.Fatal(err)
			}
			img := newImage(t, 320, append(c.mkfs, "-p", proto)...)
			f := mustOpen(t, img)
			if f.sb.v5 == c.v4 {
				t.Fatalf("version 5 is %v", f.sb.v5)
			}
			got := imageTree(t, f)
			if len(got) != len(p.want)+1 {
				t.Errorf("%d entries, want %d", len(got)-1, len(p.want))
			}
			for path, w := range p.want {
				g, ok := got[path]
				if !ok {
					t.Fatalf("%s is missing", path)
				}
				if g.Mode != w.mode || [2]uint32{g.Major, g.Minor} != w.rdev {
					t.Fatalf("%s: %+v, want %+v", path, g, w)
				}
				switch w.mode & unix.S_IFMT {
				case unix.S_IFLNK:
					if g.Link != w.content {
						t.Fatalf("%s leads to %q, want %q", path, g.Link, w.content)
					}
				case unix.S_IFREG:
					i, err := f.Inode(g.Ino)
					if err != nil {
						t.Fatal(err)
					}
					b, err := io.ReadAll(io.NewSectionReader(i, 0, g.Size))
					if err != nil || string(b) != w.content || g.UID != 1000 || g.GID != 70000 {
						t.Fatalf("%s: %d bytes, want %d (%v); %+v", path, len(b), len(w.content), err, g)
					}
				}
			}
			// The second witness.
			big := got["big"]
			out := run(t, "xfs_db", "-r", "-c", fmt.Sprintf("inode %d", big.Ino), "-c", "p core.size core.nblocks core.mtime.nsec", img)
			if m := regexp.MustCompile(`core.size = (\d+)\s+core.nblocks = (\d+)`).FindStringSubmatch(out); m == nil ||
				m[1] != fmt.Sprint(big.Size) || m[2] != fmt.Sprint(big.Blocks*512/f.sb.blockSize) {
				t.Errorf("xfs_db says %s, here it is %+v", out, big)
			}
		})
	}
}

// TestRefused opens what must be refused, and by which name.
func TestRefused(t *testing.T) {
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Skip("needs mkfs.xfs (package xfsprogs)")
	}
	img := newImage(t, 320)
	if size := mustOpen(t, img).Info().Size; size != 320<<20 {
		t.Errorf("spans %d bytes", size)
	}
	for _, c := range []struct {
		name  string
		patch func(b []byte)
		want  string
	}{
		{"unknown feature", func(b []byte) { setBits(b, sbOffIncompat, 1<<20) }, "incompatible feature bit 0x100000"},
		{"metadir", func(b []byte) { setBits(b, sbOffIncompat, incompatMetadir) }, "metadir"},
		{"zoned", func(b []byte) { setBits(b, sbOffIncompat, incompatZoned) }, "zoned"},
		{"needs repair", func(b []byte) { setBits(b, sbOffIncompat, incompatNeedsRepair) }, "xfs_repair"},
		{"external log", func(b []byte) { clear(b[48:56]) }, "external log"},
		{"version 6", func(b []byte) { b[101]++ }, "version 6"},
		{"block size", func(b []byte) { b[6] = 0x18 }, "block size"},
		{"more blocks than the image", func(b []byte) {
			binary.BigEndian.PutUint32(b[88:], 40)
			binary.BigEndian.PutUint64(b[8:], uint64(be32(b, 84))*40)
		}, "has only"},
		{"root", func(b []byte) { b[56] = 0xff }, "root inode"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bad := diskfstest.CopyImage(t, img)
			patchSuperblock(t, bad, c.patch)
			f, err := os.Open(bad)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err = Open(f, 320<<20, diskfs.Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one that names %q", err, c.want)
			}
		})
	}
	if _, err := Open(bytes.NewReader(make([]byte, 4096)), 4096, diskfs.Options{}); err == nil || !strings.Contains(err.Error(), "not recognised") {
		t.Errorf("zeroes: %v", err)
	}
	if _, err := Open(bytes.NewReader(nil), 0, diskfs.Options{}); err == nil || !strings.Contains(err.Error(), "not recognised") {
		t.Errorf("nothing: %v", err)
	}
}

// TestIOFS runs the standard library's test of file systems.
func TestIOFS(t *testing.T) {
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Skip("needs mkfs.xfs (package xfsprogs)")
	}
	p := newProtoTree(t)
	p.file(t, ".", "a", "first")
	p.dir("dir", func() {
		p.file(t, "dir", "b", strings.Repeat("second ", 3000))
		for i := range 200 {
			p.link("dir", fmt.Sprintf("link-%d", i), "b")
		}
	})
	p.text.WriteString("$\n")
	proto := filepath.Join(p.files, "proto")
	if err := os.WriteFile(proto, []byte(p.text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := fstest.TestFS(diskfs.New(mustOpen(t, newImage(t, 320, "-p", proto))), "a", "dir/b"); err != nil {
		t.Error(err)
	}
}

// TestRealtimeFile lists a file whose data lies on another device, and does not read it.
func TestRealtimeFile(t *testing.T) {
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Skip("needs mkfs.xfs (package xfsprogs)")
	}
	p := newProtoTree(t)
	p.file(t, ".", "there", "data of another device")
	p.file(t, ".", "here", "data")
	p.text.WriteString("$\n")
	proto := filepath.Join(p.files, "proto")
	if err := os.WriteFile(proto, []byte(p.text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	img := newImage(t, 320, "-p", proto)
	f := mustOpen(t, img)
	ino := inoOf(t, f, "there")
	off, err := f.sb.inodeOffset(ino)
	if err != nil {
		t.Fatal(err)
	}
	patchImage(t, img, off, int(f.sb.inodeSize), func(b []byte) {
		b[diFlags+1] |= flagRealtime
		binary.LittleEndian.PutUint32(b[diCRC:], checksum(b, diCRC))
	})
	fsys := diskfs.New(mustOpen(t, img))
	if st, err := fsys.Stat("there"); err != nil || st.Size() != 22 {
		t.Errorf("%v, %v", st, err)
	}
	if b, err := fsys.ReadFile("there"); !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "realtime") {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := fsys.ReadFile("here"); err != nil || string(b) != "data" {
		t.Errorf("%q, %v", b, err)
	}
}

package xfs

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// filler makes the files of test trees, the same for the same seed.
type filler struct {
	t   testing.TB
	dir string
	rnd *rand.Rand
}

func newFiller(t testing.TB, dir string, seed uint64) *filler {
	return &filler{t: t, dir: dir, rnd: rand.New(rand.NewPCG(seed, 1))}
}

func (p *filler) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *filler) path(name string) string { return filepath.Join(p.dir, name) }

func (p *filler) bytes(n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += 8 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], p.rnd.Uint64())
		copy(b[i:], w[:])
	}
	return b
}

func (p *filler) mkdir(name string) { p.must(os.MkdirAll(p.path(name), 0o755)) }

func (p *filler) write(name string, content []byte) {
	p.t.Helper()
	p.must(os.WriteFile(p.path(name), content, 0o644))
}

func (p *filler) open(name string) *os.File {
	p.t.Helper()
	f, err := os.OpenFile(p.path(name), os.O_RDWR|os.O_CREATE, 0o644)
	p.must(err)
	return f
}

func (p *filler) writeAt(name string, b []byte, off int64) {
	p.t.Helper()
	f := p.open(name)
	_, err := f.WriteAt(b, off)
	p.must(err)
	p.must(f.Close())
}

func (p *filler) fallocate(name string, mode uint32, off, n int64) {
	p.t.Helper()
	f := p.open(name)
	p.must(unix.Fallocate(int(f.Fd()), mode, off, n))
	p.must(f.Close())
}

func (p *filler) reflink(from, to string) {
	p.t.Helper()
	a, b := p.open(from), p.open(to)
	p.must(unix.IoctlFileClone(int(b.Fd()), int(a.Fd())))
	p.must(a.Close())
	p.must(b.Close())
}

func (p *filler) xattr(name, key string, value []byte) {
	p.t.Helper()
	p.must(unix.Lsetxattr(p.path(name), key, value, 0))
}

// acl encodes entries of tag, permissions and id as setxattr(2) wants them.
func acl(entries ...[3]uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

// manyExtents writes a file of n blocks and punches every second one out.
func (p *filler) manyExtents(name string, n, block int64) {
	p.t.Helper()
	f := p.open(name)
	_, err := f.Write(p.bytes(int(n * block)))
	p.must(err)
	for i := int64(0); i < n; i += 2 {
		p.must(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, i*block, block))
	}
	p.must(f.Close())
}

func (p *filler) many(dir string, n, pad int) {
	p.t.Helper()
	p.mkdir(dir)
	for i := range n {
		p.write(fmt.Sprintf("%s/%06d-%s", dir, i, strings.Repeat("x", pad)), nil)
	}
}

// all fills a tree with everything that the reader must know.
func (p *filler) all(block int64, reflink bool) {
	t := p.t
	t.Helper()
	for _, n := range []int{0, 1, int(block) - 1, int(block), int(block) + 1, 300_001} {
		p.write(fmt.Sprintf("size-%d", n), p.bytes(n))
	}
	p.files(block)
	p.special()
	p.xattrs()

	// Short form, block, leaf and node directories, and some with holes.
	p.mkdir("dir/empty")
	p.many("dir/short", 3, 1)
	p.many("dir/block", 40, 1)
	p.many("dir/leaf", 400, 20)
	p.many("dir/node", 5000, 20)
	p.many("dir/thinned", 1500, 40)
	for i := range 1500 {
		if i%3 != 0 || i > 600 && i < 1200 {
			p.must(os.Remove(p.path(fmt.Sprintf("dir/thinned/%06d-%s", i, strings.Repeat("x", 40)))))
		}
	}
	p.mkdir("dir/odd")
	for _, name := range []string{"ä", "\xff\xfe", "a b\nc", "-", strings.Repeat("n", 255), "…", "A", "a"} {
		p.write("dir/odd/"+name, []byte(name))
	}
	if reflink {
		p.write("reflink-a", p.bytes(50*int(block)))
		p.reflink("reflink-a", "reflink-b")
		p.writeAt("reflink-b", p.bytes(int(block)*3), block*7+5)
		p.writeAt("reflink-a", p.bytes(int(block)), block*30)
	}
}

func (p *filler) files(block int64) {
	t := p.t
	t.Helper()
	p.writeAt("sparse", p.bytes(5000), 100<<20+123)
	p.writeAt("sparse", p.bytes(5000), 40<<20)
	p.writeAt("huge", p.bytes(5000), 1<<39)
	p.must(os.Truncate(p.path("huge"), 1<<40))
	p.fallocate("preallocated", 0, 0, 1<<20)
	p.writeAt("preallocated", p.bytes(10_000), 300_000)
	p.fallocate("preallocated-beyond", unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20)
	p.writeAt("preallocated-beyond", p.bytes(100), 0)
	p.write("holes", p.bytes(1<<20))
	p.fallocate("holes", unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 100_000, 300_000)
	p.write("zeroed", p.bytes(1<<20))
	p.fallocate("zeroed", unix.FALLOC_FL_ZERO_RANGE, 100_000, 300_000)
	p.manyExtents("extents-40", 80, block)
	p.manyExtents("extents-2000", 4000, block)
}

func (p *filler) special() {
	t := p.t
	t.Helper()
	for _, n := range []int{1, 100, 335, 336, 337, 900, 1023} {
		p.must(os.Symlink(strings.Repeat("t", n), p.path(fmt.Sprintf("link-%d", n))))
	}
	p.write("hard-1", []byte("hard"))
	p.must(os.Link(p.path("hard-1"), p.path("hard-2")))
	p.mkdir("sub")
	p.must(os.Link(p.path("hard-1"), p.path("sub/hard-3")))
	p.must(unix.Mkfifo(p.path("fifo"), 0o600))
	p.must(unix.Mknod(p.path("socket"), unix.S_IFSOCK|0o660, 0))
	p.must(unix.Mknod(p.path("char"), unix.S_IFCHR|0o620, int(unix.Mkdev(4, 64))))
	p.must(unix.Mknod(p.path("block"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000))))
	p.write("setuid", nil)
	p.must(os.Chown(p.path("setuid"), 12345, 4_000_000_000))
	p.must(os.Chmod(p.path("setuid"), 0o755|os.ModeSetuid|os.ModeSetgid|os.ModeSticky))
	for i, at := range []time.Time{
		time.Unix(0, 1), time.Unix(1_700_000_000, 123_456_789), time.Date(1905, 1, 1, 0, 0, 0, 5, time.UTC),
		time.Date(2037, 1, 1, 0, 0, 0, 999_999_999, time.UTC), time.Date(2300, 1, 1, 0, 0, 0, 7, time.UTC),
	} {
		name := fmt.Sprintf("time-%d", i)
		p.write(name, nil)
		p.must(os.Chtimes(p.path(name), at, at))
	}
}

func (p *filler) xattrs() {
	t := p.t
	t.Helper()
	p.write("xattr-short", nil)
	p.xattr("xattr-short", "user.a", []byte("value"))
	p.xattr("xattr-short", "user.empty", nil)
	p.xattr("xattr-short", "trusted.b", []byte{0, 1, 2})
	p.xattr("xattr-short", "security.capability", append([]byte{1, 0, 0, 2}, make([]byte, 16)...))
	p.write("xattr-leaf", []byte("x"))
	p.xattr("xattr-leaf", "user.big", p.bytes(1000))
	p.xattr("xattr-leaf", "user.other", p.bytes(300))
	p.write("xattr-node", nil)
	for i := range 300 {
		p.xattr("xattr-node", fmt.Sprintf("user.%d.%s", i, strings.Repeat("k", i%100)), p.bytes(i))
	}
	p.mkdir("xattr-remote")
	p.xattr("xattr-remote", "user.64k", p.bytes(65536))
	p.xattr("xattr-remote", "user.4k", p.bytes(4096))
	p.xattr("xattr-remote", "trusted.5000", p.bytes(5000))
	p.must(os.Symlink("target", p.path("xattr-link")))
	p.xattr("xattr-link", "trusted.on-link", []byte("l"))

	p.mkdir("acl")
	list := acl([3]uint32{1, 7, ^uint32(0)}, [3]uint32{2, 5, 1234}, [3]uint32{4, 5, ^uint32(0)},
		[3]uint32{8, 4, 99}, [3]uint32{16, 7, ^uint32(0)}, [3]uint32{32, 5, ^uint32(0)})
	p.xattr("acl", "system.posix_acl_access", list)
	p.xattr("acl", "system.posix_acl_default", list)
	p.write("acl/inherits", nil)
}

// fragmentedDirs makes two directories grow in turns, so that their blocks lie apart and
// their extents need a tree.
func (p *filler) fragmentedDirs(n int) {
	p.t.Helper()
	p.mkdir("frag/a")
	p.mkdir("frag/b")
	pad := strings.Repeat("y", 230)
	for i := range n {
		for _, d := range []string{"a", "b"} {
			p.must(os.Symlink("t", p.path(fmt.Sprintf("frag/%s/%06d-%s", d, i, pad))))
		}
	}
}

//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// want says what populate makes.
type want struct {
	files  int  // in the big directory
	big    int  // MiB written in one go
	acl    bool // POSIX ACLs and trusted attributes: only through a mount
	bigVal bool // attribute values greater than a block
	old    bool // the volume cannot express times past 2038 or before 1901
	near   bool // no times near those limits either
}

// populate fills dir with every kind of file that a reader must understand.
func populate(t *testing.T, dir string, w want) {
	t.Helper()
	p := func(name string) string { return filepath.Join(dir, name) }
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	rnd := rand.NewChaCha8([32]byte{1})
	random := func(n int) []byte {
		b := make([]byte, n)
		rnd.Read(b)
		return b
	}
	write := func(name string, b []byte) { t.Helper(); must(os.WriteFile(p(name), b, 0o644)) }

	// Directories: many files, long names, deep, empty, once full and now empty.
	must(os.Mkdir(p("many"), 0o755))
	for i := range w.files {
		write(fmt.Sprintf("many/file-%05d", i), fmt.Appendf(nil, "content of %d", i))
	}
	must(os.Mkdir(p("longnames"), 0o700))
	for i := range 60 {
		write(fmt.Sprintf("longnames/%03d%s", i, strings.Repeat("x", 252)), nil)
	}
	write("longnames/\xff\xfenot-utf8-\x01", []byte("bytes"))
	write("longnames/ünïcode-☃", []byte("text"))
	must(os.MkdirAll(p("a/b/c/d/e/f/g"), 0o755), os.Mkdir(p("empty"), 0o1777), os.Mkdir(p("emptied"), 0o755))
	for i := range 200 {
		write(fmt.Sprintf("emptied/gone-%d", i), nil)
	}
	for i := range 200 {
		must(os.Remove(p(fmt.Sprintf("emptied/gone-%d", i))))
	}
	for i := range 12 { // small directories around the inline limit
		must(os.Mkdir(p(fmt.Sprintf("dir%02d", i)), 0o755))
		for k := range i {
			write(fmt.Sprintf("dir%02d/f%d", i, k), []byte{byte(k)})
		}
	}

	// Contents: of sizes around every limit, sparse, in pieces, preallocated.
	must(os.Mkdir(p("sizes"), 0o755))
	for _, n := range []int{0, 1, 59, 60, 61, 100, 155, 156, 157, 160, 161, 1023, 1024, 1025, 4095, 4096, 4097, 12288, 49152, 49153, 70000, 300000} {
		write(fmt.Sprintf("sizes/%d", n), random(n))
	}
	pieces, err := os.Create(p("pieces"))
	must(err)
	for i := range 700 { // every other 4 KiB: hundreds of extents, an extent tree
		_, err := pieces.WriteAt(random(4096), int64(i)*8192)
		must(err)
	}
	must(pieces.Close())
	far, err := os.Create(p("far"))
	must(err)
	for _, off := range []int64{0, 13 << 10, 300 << 10, 5 << 20, 70 << 20, 600 << 20, 5 << 30} {
		_, err := far.WriteAt([]byte("far away"), off)
		must(err)
	}
	must(far.Truncate(6<<30+123), far.Close())
	hole, err := os.Create(p("allhole"))
	must(err, hole.Truncate(1<<20+1), hole.Close())
	pre, err := os.Create(p("prealloc"))
	must(err)
	if err := unix.Fallocate(int(pre.Fd()), 0, 0, 1<<20); err == nil {
		_, err := pre.WriteAt(random(5000), 400000)
		must(err)
		must(unix.Fallocate(int(pre.Fd()), unix.FALLOC_FL_KEEP_SIZE, 1<<20, 1<<20))
	} else if !errors.Is(err, unix.EOPNOTSUPP) {
		t.Fatal(err)
	}
	must(pre.Close())
	if w.big > 0 {
		big, err := os.Create(p("big"))
		must(err)
		for range w.big {
			_, err := big.Write(random(1 << 20))
			must(err)
		}
		must(big.Close())
	}

	// Links and special files.
	must(os.Mkdir(p("links"), 0o755))
	for _, n := range []int{1, 58, 59, 60, 61, 100, 154, 155, 156, 157, 500, 1000} {
		must(os.Symlink(strings.Repeat("t", n), p(fmt.Sprintf("links/target%d", n))))
	}
	must(os.Symlink("../sizes/4097", p("links/relative")), os.Symlink("/sizes/61", p("links/absolute")),
		os.Symlink("../../../../../etc/passwd", p("links/escape")), os.Symlink("loop", p("links/loop")))
	for i := range 3 {
		must(os.Link(p("sizes/70000"), p(fmt.Sprintf("links/hard%d", i))))
	}
	must(unix.Mknod(p("fifo"), unix.S_IFIFO|0o640, 0), unix.Mknod(p("socket"), unix.S_IFSOCK|0o600, 0),
		unix.Mknod(p("char"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mknod(p("block"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70000))))

	// Modes, owners.
	for i, mode := range []uint32{0, 0o777, 0o4755, 0o2755, 0o1644, 0o6711} {
		name := fmt.Sprintf("mode%d", i)
		write(name, []byte(name))
		must(os.Lchown(p(name), i*70000, 1<<31+i), unix.Chmod(p(name), mode))
	}
	must(os.Lchown(p("links/loop"), 12, 34))

	// Attributes.
	write("attrs", []byte("attributes"))
	set := func(name, attr string, value []byte) {
		t.Helper()
		must(unix.Lsetxattr(p(name), attr, value, 0))
	}
	set("attrs", "user.small", []byte("v"))
	set("attrs", "user.empty", nil)
	for i := range 12 { // more than fit the inode
		set("attrs", fmt.Sprintf("user.n%02d", i), random(30))
	}
	set("a", "user.dir", []byte("directory"))
	set("attrs", "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	set("links/loop", "trusted.link", []byte("of a link"))
	if w.acl {
		acl := []byte{2, 0, 0, 0}
		for _, e := range [][3]uint32{{1, 7, 0xffffffff}, {2, 5, 1000}, {2, 6, 70000}, {4, 5, 0xffffffff}, {8, 4, 42}, {16, 7, 0xffffffff}, {32, 0, 0xffffffff}} {
			acl = le.AppendUint32(le.AppendUint16(le.AppendUint16(acl, uint16(e[0])), uint16(e[1])), e[2])
		}
		set("attrs", "system.posix_acl_access", acl)
		set("a", "system.posix_acl_default", acl)
	}
	if w.bigVal {
		write("bigattrs", nil)
		set("bigattrs", "user.big", random(20000))
		set("bigattrs", "user.big2", bytes.Repeat([]byte("z"), 9000))
		set("bigattrs", "user.little", random(10))
	}

	// Times, last, since all the above changes them.
	times := []time.Time{time.Unix(0, 0), time.Unix(1, 1), time.Unix(1700000000, 123456789), time.Unix(-1, 0)}
	if !w.near {
		times = append(times, time.Unix(1<<31-1, 999999999), time.Unix(-1<<31, 0))
	}
	if !w.old {
		times = append(times, time.Unix(1<<31, 5), time.Unix(1<<32+7, 8), time.Unix(3<<32, 999999999))
	}
	for i, at := range times {
		name := fmt.Sprintf("time%d", i)
		write(name, nil)
		must(os.Chtimes(p(name), at, at.Add(time.Hour/4)))
	}
}

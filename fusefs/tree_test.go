package fusefs_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

const mib = 1 << 20

// acl allows the user 1000 to read, besides the mode; see acl(5) and posix_acl_xattr.h.
var acl = []byte("\x02\x00\x00\x00" +
	"\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" + "\x04\x00\x00\x00\xff\xff\xff\xff" +
	"\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff")

// populate fills a mounted file system with every kind of file.
func populate(t testing.TB, dir string, files int) {
	t.Helper()
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	p := func(name string) string { return filepath.Join(dir, name) }
	random := func(n int) []byte {
		b := make([]byte, n)
		rand.NewChaCha8([32]byte{byte(n)}).Read(b)
		return b
	}
	must(os.Mkdir(p("many"), 0o755))
	for i := range files {
		must(os.WriteFile(p(fmt.Sprintf("many/file-%05d", i)), fmt.Appendf(nil, "content of %d", i), 0o644))
	}
	must(os.MkdirAll(p("a/b/c"), 0o2750), os.Chmod(p("a/b"), 0o1777|os.ModeSticky),
		os.WriteFile(p("a/b/c/data"), random(3*mib+7), 0o600), os.WriteFile(p("empty"), nil, 0o444),
		os.WriteFile(p("tool"), random(5000), 0o755), os.Chown(p("tool"), 1234, 4321), os.Chmod(p("tool"), 0o755|os.ModeSetuid),
		os.Link(p("tool"), p("a/hard")), os.Symlink("a/b/c/data", p("short")), os.Symlink(strings.Repeat("long/", 60), p("long")),
		os.WriteFile(p("\xff\xfenot utf-8\n"), []byte("x"), 0o644),
		unix.Mkfifo(p("fifo"), 0o620), unix.Mknod(p("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mknod(p("block"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70000))), unix.Mknod(p("socket"), unix.S_IFSOCK|0o700, 0),
		unix.Setxattr(p("tool"), "user.name", []byte("value"), 0), unix.Setxattr(p("a"), "trusted.overlay", random(300), 0),
		unix.Setxattr(p("empty"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0),
		unix.Setxattr(p("empty"), "user.empty", nil, 0),
		unix.Setxattr(p("a/b/c/data"), "system.posix_acl_access", acl, 0), unix.Setxattr(p("many"), "system.posix_acl_default", acl, 0))
	sparse, err := os.Create(p("sparse"))
	must(err)
	for _, off := range []int64{1 * mib, 9 * mib, 70 * mib, 3 << 30} {
		_, err := sparse.WriteAt(random(5000), off)
		must(err)
	}
	must(sparse.Truncate(5<<30), sparse.Close())
	pieces, err := os.Create(p("pieces"))
	must(err)
	for i := range int64(40) {
		_, err := pieces.WriteAt(random(4096), i*12288)
		must(err)
	}
	must(pieces.Close())
	times := []unix.Timespec{unix.NsecToTimespec(987654321012345678), unix.NsecToTimespec(1234567890123456789)}
	must(unix.UtimesNanoAt(unix.AT_FDCWD, p("short"), times, unix.AT_SYMLINK_NOFOLLOW), unix.UtimesNanoAt(unix.AT_FDCWD, p("a/b"), times, 0))
}

// newVolume makes an image with a populated file system.
func newVolume(t testing.TB, size int64, mkfs []string, files int) string {
	t.Helper()
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, mkfs[0])
	image := diskfstest.NewImage(t, size)
	diskfstest.Run(t, mkfs[0], append(mkfs[1:], image)...)
	dir, unmount := diskfstest.Mount(t, image, "")
	populate(t, dir, files)
	unmount()
	return image
}

// crash returns a copy of the image in the middle of work: with a journal that must be
// replayed.
func crash(t testing.TB, image string) string {
	t.Helper()
	dir, unmount := diskfstest.Mount(t, image, "")
	defer unmount()
	for i := range 300 {
		name := filepath.Join(dir, fmt.Sprintf("many/late-%03d", i))
		if err := os.WriteFile(name, []byte(name), 0o640); err != nil {
			t.Fatal(err)
		}
		if i%3 == 0 {
			if err := os.Rename(name, filepath.Join(dir, fmt.Sprintf("moved-%03d", i))); err != nil {
				t.Fatal(err)
			}
		}
	}
	// fsync writes the journal, and the blocks in place only later.
	f, err := os.OpenFile(filepath.Join(dir, "many/late-001"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return diskfstest.CopyInUse(t, image)
}

var (
	mkExt4 = []string{"mkfs.ext4", "-q", "-F"}
	mkXFS  = []string{"mkfs.xfs", "-q"}
)

// through ignores what FUSE cannot show as the volume's own driver does.
var through = diskfstest.Options{
	IgnoreIno:   true, // numbers of the whole tree
	IgnoreAtime: true, // reading the kernel's mount changes it there
	IgnoreCtime: true, // creation: FUSE reports it to
}

func TestFilesAsTheKernelShowsThem(t *testing.T) {
	for _, c := range []struct {
		name  string
		mkfs  []string
		size  int64
		files int
		dirty bool
		big   int64 // bytes of one more file
		more  func(t testing.TB, image string)
		log   string
	}{
		{name: "ext4", mkfs: mkExt4, size: 640 * mib, files: 5000, big: 300 * mib, log: "clean"},
		{name: "ext4-inline", mkfs: append(mkExt4, "-O", "inline_data"), size: 64 * mib, files: 100, log: "clean"},
		{name: "ext4-dirty", mkfs: mkExt4, size: 128 * mib, files: 300, dirty: true, log: "replayed"},
		{name: "xfs", mkfs: mkXFS, size: 512 * mib, files: 5000, log: "clean"},
		{name: "xfs-shapes", mkfs: mkXFSShapes, size: 320 * mib, files: 100, more: shapeXFS, log: "clean"},
		{name: "xfs-dirty", mkfs: mkXFS, size: 512 * mib, files: 300, dirty: true, log: "replayed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			needFUSE(t)
			image := newVolume(t, c.size, slices.Clone(c.mkfs), c.files)
			if c.big > 0 {
				addBig(t, image, c.big)
			}
			if c.more != nil {
				c.more(t, image)
			}
			if c.dirty {
				image = crash(t, image)
			}
			repo := repotest.New(t).Open(t)
			save(t, repo, shopDB, image)
			m := mount(t, repo, fusefs.Options{})
			if c.big == 0 { // the other disks are smaller and test the same
				checkDisk(t, m.latest(shopDB, "disk.img"), image)
			}

			options := "ro"
			if c.name == "xfs-dirty" {
				options += ",nouuid"
			}
			want, _ := diskfstest.Mount(t, diskfstest.CopyImage(t, image), options)
			n := diskfstest.CompareDirs(t, m.latest(shopDB, "files"), want, through)
			if n < c.files {
				t.Errorf("only %d entries were compared", n)
			}
			if v := m.info(t, shopDB).Volumes; len(v) != 1 || v[0].Journal != c.log {
				t.Errorf("volumes are %+v, want the journal to be %s", v, c.log)
			}
			checkNumbers(t, m.latest(shopDB, "files"))
		})
	}
}

// addBig adds a large file, which has more extents than an inode holds.
func addBig(t testing.TB, image string, size int64) {
	t.Helper()
	dir, unmount := diskfstest.Mount(t, image, "")
	defer unmount()
	f, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4*mib)
	random := rand.NewChaCha8([32]byte{1})
	for off := int64(0); off < size && err == nil; off += int64(len(b)) {
		random.Read(b[:mib/2]) // the rest repeats: hashing and packing it is quick
		_, err = f.WriteAt(b, off)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// checkDisk compares disk.img with the image: bytes, and that holes are found that
// hold all that is data.
func checkDisk(t testing.TB, got, image string) {
	t.Helper()
	want, size := diskfstest.Open(t, image)
	f, gotSize := diskfstest.Open(t, got)
	if gotSize != size {
		t.Fatalf("disk.img has %d bytes, want %d", gotSize, size)
	}
	a, b := sha256.New(), sha256.New()
	if _, err := io.Copy(a, struct{ io.Reader }{io.NewSectionReader(want, 0, size)}); err != nil {
		t.Fatal(err)
	}
	// The runtime's own signals may interrupt a call that waits for the server.
	seek := func(off int64, whence int) (at int64, err error) {
		for at, err = unix.Seek(int(f.Fd()), off, whence); errors.Is(err, unix.EINTR); {
			at, err = unix.Seek(int(f.Fd()), off, whence)
		}
		return at, err
	}
	// Holes as SEEK_DATA reports them, zeroes between.
	data := int64(0)
	for off := int64(0); off < size; {
		start, err := seek(off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			start = size
		} else if err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(b, zeroes{}, start-off); err != nil {
			t.Fatal(err)
		}
		if start == size {
			break
		}
		if off, err = seek(start, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(b, io.NewSectionReader(f, start, off-start)); err != nil {
			t.Fatal(err)
		}
		data += off - start
	}
	if got, want := b.Sum(nil), a.Sum(nil); string(got) != string(want) {
		t.Errorf("disk.img has SHA-256 %x, want %x", got, want)
	}
	if data == 0 || data == size {
		t.Errorf("%d of %d bytes are said to be data", data, size)
	}
	// Another process: in this one a page fault would hold a processor of the Go
	// runtime that the server may need to answer it.
	diskfstest.NeedTool(t, "python3")
	sum := diskfstest.Run(t, "python3", "-c", `import hashlib, mmap, sys
f = open(sys.argv[1], "rb")
print(hashlib.sha256(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)).hexdigest())`, got)
	if strings.TrimSpace(sum) != hex.EncodeToString(a.Sum(nil)) {
		t.Error("disk.img reads differently through mmap")
	}
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// checkNumbers checks that hard links share an inode number and other files do not.
func checkNumbers(t testing.TB, dir string) {
	t.Helper()
	number := func(name string) uint64 {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	if number("tool") != number("a/hard") {
		t.Error("hard links have different inode numbers")
	}
	if number("tool") == number("empty") {
		t.Error("two files have the same inode number")
	}
}

func TestInodeNumbersOutliveTheMount(t *testing.T) {
	needFUSE(t)
	image := newVolume(t, 64*mib, slices.Clone(mkExt4), 5)
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	var numbers []uint64
	for range 2 {
		m := mount(t, repo, fusefs.Options{})
		var st unix.Stat_t
		if err := unix.Stat(m.latest(shopDB, "files/tool"), &st); err != nil {
			t.Fatal(err)
		}
		numbers = append(numbers, st.Ino)
	}
	if numbers[0] != numbers[1] {
		t.Errorf("the numbers of one file are %x", numbers)
	}
}

func TestPartitions(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedTool(t, "sfdisk")
	ext, xfs := newVolume(t, 64*mib, slices.Clone(mkExt4), 20), newVolume(t, 320*mib, slices.Clone(mkXFS), 20)
	image := diskfstest.NewImage(t, 512*mib)
	script := filepath.Join(t.TempDir(), "table")
	table := "label: gpt\nstart=1MiB,size=64MiB\nstart=65MiB,size=320MiB\nstart=385MiB,size=8MiB\nstart=393MiB,size=8MiB\n"
	if err := os.WriteFile(script, []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "sh", "-c", "sfdisk -q "+image+" < "+script)
	diskfstest.Run(t, "dd", "if="+ext, "of="+image, "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
	diskfstest.Run(t, "dd", "if="+xfs, "of="+image, "bs=1M", "seek=65", "conv=notrunc,sparse", "status=none")
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("_BHRfS_M"), 393*mib+65536+64); err != nil {
		t.Fatal(err)
	}
	f.Close()

	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{})
	for _, c := range []struct{ name, image string }{{"files/p1", ext}, {"files/p2", xfs}} {
		want, _ := diskfstest.Mount(t, c.image, "ro")
		diskfstest.CompareDirs(t, m.latest(shopDB, c.name), want, through)
	}
	// Virtual files also have a length of names and a size of blocks.
	for _, name := range []string{"..", ".", "disk.img", "info.json", "files", "files/p3", "files/p3/ERROR.txt", "files/p1"} {
		var st unix.Statfs_t
		if err := unix.Statfs(m.latest(shopDB, name), &st); err != nil || st.Namelen != 255 || st.Bsize == 0 || st.Frsize == 0 {
			t.Errorf("statfs of %s: %+v, %v", name, st, err)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(m.Dir, &st); err != nil || st.Namelen != 255 || st.Bsize == 0 {
		t.Errorf("statfs of the mount: %+v, %v", st, err)
	}
	for name, want := range map[string]string{"files/p3": "not recognised", "files/p4": "btrfs"} {
		b, err := os.ReadFile(filepath.Join(m.latest(shopDB, name), "ERROR.txt"))
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %q, %v; want it to say %q", name, b, err, want)
		}
	}
}

// An MBR with a logical partition, and an LVM2 group with a volume in two pieces, are read in
// the tree as the kernel reads them.
func TestLogicalPartitionsAndVolumes(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedTool(t, "sfdisk")
	diskfstest.NeedTool(t, "lvm")
	ext, xfs := newVolume(t, 64*mib, slices.Clone(mkExt4), 20), newVolume(t, 320*mib, slices.Clone(mkXFS), 20)
	image := diskfstest.NewImage(t, 640*mib)
	script := filepath.Join(t.TempDir(), "table")
	table := "label: dos\nstart=1MiB,size=500MiB,type=8e\nstart=510MiB,size=100MiB,type=5\nstart=512MiB,size=64MiB\n"
	if err := os.WriteFile(script, []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "sh", "-c", "sfdisk -q "+image+" < "+script)
	write := func(volume string, from, length, to int) {
		diskfstest.Run(t, "dd", "if="+volume, "of="+image, "bs=1M", fmt.Sprintf("skip=%d", from), fmt.Sprintf("count=%d", length),
			fmt.Sprintf("seek=%d", to), "conv=notrunc,sparse", "status=none")
	}
	write(ext, 0, 64, 512)
	func() {
		loop := strings.TrimSpace(diskfstest.Run(t, "losetup", "--find", "--show", "--offset", "1048576", "--sizelimit", fmt.Sprint(500*mib), image))
		defer diskfstest.Run(t, "losetup", "--detach", loop)
		run := func(args ...string) {
			config := `devices { scan="/dev" use_devicesfile=0 filter=["a|` + loop + `$|","r|.*|"] } activation { udev_sync=0 udev_rules=0 } backup { backup=0 archive=0 }`
			diskfstest.Run(t, "lvm", append(args, "--config", config, "--driverloaded", "n")...)
		}
		run("pvcreate", "-q", loop)
		run("vgcreate", "-q", "-s", "1m", "vg", loop)
		for _, v := range [][]string{{"data", "200m"}, {"other", "10m"}} {
			run("lvcreate", "-an", "-Zn", "-Wn", "-n", v[0], "-L", v[1], "vg")
		}
		run("lvextend", "-L", "320m", "vg/data")
	}()
	// The first extent is 1 MiB into the partition.
	write(xfs, 0, 200, 2)
	write(xfs, 200, 120, 2+210)

	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{})
	for _, c := range []struct{ name, image string }{{"files/p5", ext}, {"files/vg/data", xfs}} {
		want, _ := diskfstest.Mount(t, c.image, "ro")
		diskfstest.CompareDirs(t, m.latest(shopDB, c.name), want, through)
	}
}

func TestPointsComeAndGo(t *testing.T) {
	needFUSE(t)
	image := diskfstest.NewImage(t, 8*mib)
	r := repotest.New(t)
	repo := r.Open(t)
	first := save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{Refresh: 20 * time.Millisecond})
	dir := filepath.Join(m.Dir, "shop/db")
	if got := names(t, dir); len(got) != 2 {
		t.Fatalf("the volume holds %q", got)
	}
	other := r.Open(t)
	second := save(t, other, shopDB, image)
	wait(t, func() bool {
		to, err := os.Readlink(filepath.Join(dir, "latest"))
		return err == nil && len(names(t, dir)) == 3 && strings.HasSuffix(second.Name(), to)
	})
	if _, err := backup.Forget(t.Context(), other, backup.ForgetOptions{Names: []string{first.ID}, Cluster: "test"}); err != nil {
		t.Fatal(err)
	}
	wait(t, func() bool { return len(names(t, dir)) == 2 })
	// What was open and is used again has a lease, and stays.
	if _, err := os.ReadFile(filepath.Join(dir, "latest/disk.img")); err != nil {
		t.Fatal(err)
	}
	wait(t, func() bool {
		if err := other.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		leases, err := points.Leases(t.Context(), other)
		return err == nil && len(leases[second.ID]) == 1
	})
	if _, err := backup.Forget(t.Context(), other, backup.ForgetOptions{Names: []string{second.ID}, Cluster: "test"}); !errors.Is(err, points.ErrLeased) {
		t.Errorf("a point that is being read could be forgotten: %v", err)
	}
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range list {
		out = append(out, e.Name())
	}
	return out
}

// wait polls until a condition holds; otherwise the test's time limit ends it.
func wait(t testing.TB, cond func() bool) {
	t.Helper()
	for !cond() {
		select {
		case <-t.Context().Done():
			t.Fatal("the test ended while it waited")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// A file system of 1 TiB is listed by reading only what a listing needs.
func TestFirstListingOfALargeVolume(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedTool(t, "mkfs.xfs")
	image := diskfstest.NewImage(t, 1<<40)
	// XFS writes four places of such a disk; ext4 would write thousands.
	proto := filepath.Join(t.TempDir(), "proto")
	if err := os.WriteFile(proto, []byte("boot\n0 0\nd--755 0 0\nhello ---644 0 0 "+proto+"\n$\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "mkfs.xfs", "-q", "-K", "-l", "size=64m", "-p", proto, image)
	repo := repotest.New(t).Open(t)
	p := save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{})
	if got := names(t, m.latest(shopDB, "files")); !slices.Contains(got, "hello") {
		t.Fatalf("the root holds %q", got)
	}
	i := m.info(t, shopDB)
	t.Logf("a listing fetched %d bytes in %d reads; blocks have %d bytes", i.Fetched.Bytes, i.Fetched.Blocks, p.BlockSize)
	if limit := 16 * p.BlockSize; i.Fetched.Bytes == 0 || i.Fetched.Bytes > limit {
		t.Errorf("a listing fetched %d bytes, want at most %d", i.Fetched.Bytes, limit)
	}
}

//go:build linux

package ntfs

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// asShown leaves out what ntfs-3g makes up: it shows no blocks for resident files,
// directories' sizes, and data ranges through FUSE are whole files.
var asShown = diskfstest.Options{IgnoreBlocks: true, IgnoreDirSize: true, IgnoreData: true, IgnoreNlink: true, IgnoreCtime: true}

func open(t testing.TB, image string) *FS {
	t.Helper()
	r, size := diskfstest.Open(t, image)
	f, err := Open(r, size, diskfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestAgainstNTFS3G(t *testing.T) {
	for _, c := range []struct {
		name     string
		args     []string
		files    int
		big      int
		compress bool
	}{
		{"default", nil, 5000, 24 << 20, true},
		{"512-byte clusters", []string{"-c", "512"}, 300, 3 << 20, true},
		{"64k clusters", []string{"-c", "65536"}, 300, 3 << 20, false},
		{"2M clusters", []string{"-c", "2097152"}, 10, 3 << 20, false},
		{"4k sectors", []string{"-s", "4096"}, 300, 3 << 20, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			image := newVolume(t, 512<<20, c.args...)
			options := "rw,big_writes,umask=022"
			if c.compress {
				options += ",compression"
			}
			dir, unmount := mount(t, image, options)
			w := newWriter(t, dir)
			w.basic(c.files, c.big)
			w.streams()
			if c.compress {
				w.fragments(4000)
				w.compressed()
			}
			unmount()

			dir, _ = mount(t, image, "ro,umask=022")
			f := open(t, image)
			if i := f.Info(); i.Label != "MYLABEL ünïcode" || len(i.UUID) != 16 || i.Log != diskfs.LogClean {
				t.Errorf("%+v", i)
			}
			n := diskfstest.Compare(t, diskfs.New(f), dir, asShown)
			t.Logf("%d entries compared", n)
		})
	}
}

func TestIOFS(t *testing.T) {
	image := newVolume(t, 64<<20)
	dir, unmount := mount(t, image, "rw,umask=022")
	w := newWriter(t, dir)
	w.file("a", 100)
	w.file("dir/b", 10000)
	w.must(os.Symlink("a", w.path("link")))
	unmount()
	if err := fstest.TestFS(diskfs.New(open(t, image)), "a", "dir/b"); err != nil {
		t.Error(err)
	}
}

// reparsePoint is a reparse point as ntfs-3g takes it.
func reparsePoint(tag uint32, data []byte) []byte {
	b := le.AppendUint32(nil, tag)
	b = le.AppendUint16(b, uint16(len(data)))
	return append(append(b, 0, 0), data...)
}

// windowsLink is the data of a symbolic link (flags >= 0) or a junction.
func windowsLink(target string, flags int) []byte {
	var u []byte
	for _, r := range target {
		u = le.AppendUint16(u, uint16(r))
	}
	var b []byte
	for _, v := range []int{0, len(u), len(u), 0} {
		b = le.AppendUint16(b, uint16(v))
	}
	if flags >= 0 {
		b = le.AppendUint32(b, uint32(flags))
	}
	return append(b, u...)
}

func TestReparsePoints(t *testing.T) {
	image := newVolume(t, 64<<20)
	dir, unmount := mount(t, image, "rw,umask=022")
	w := newWriter(t, dir)
	w.file("users/me/file", 10)
	points := map[string]struct {
		dir  bool
		data []byte
	}{
		"relative":  {false, reparsePoint(tagSymlink, windowsLink(`users\me\file`, 1))},
		"absolute":  {false, reparsePoint(tagSymlink, windowsLink(`\??\C:\users\me\file`, 0))},
		"junction":  {true, reparsePoint(tagMountPoint, windowsLink(`\??\C:\users`, -1))},
		"linux":     {false, reparsePoint(tagLXSymlink, []byte("\x02\x00\x00\x00users/me"))},
		"overlay":   {false, reparsePoint(0x80000017, make([]byte, 16))},
		"cloud":     {false, reparsePoint(0x9000301a, make([]byte, 16))},
		"clouds":    {true, reparsePoint(0x9000301a, make([]byte, 16))},
		"elsewhere": {false, reparsePoint(0x80001234, make([]byte, 16))},
	}
	for name, p := range points {
		if p.dir {
			w.must(os.Mkdir(w.path(name), 0o755))
		} else {
			w.must(os.WriteFile(w.path(name), nil, 0o644))
		}
		if err := unix.Setxattr(w.path(name), "system.ntfs_reparse_data", p.data, 0); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	unmount()
	fsys := diskfs.New(open(t, image))
	for name, want := range map[string]string{"relative": "users/me/file", "absolute": "/users/me/file", "junction": "/users", "linux": "users/me"} {
		if got, err := fsys.ReadLink(name); err != nil || got != want {
			t.Errorf("%s leads to %q, %v; want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"relative", "absolute", "junction/me/file", "linux/file"} {
		if st, err := fsys.Stat(name); err != nil || st.Size() != 10 {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
	for name, want := range map[string]fs.FileMode{"clouds": fs.ModeDir, "overlay": 0} {
		if st, err := fsys.Lstat(name); err != nil || st.Mode().Type() != want {
			t.Errorf("%s is %v, %v; want %v", name, st, err, want)
		}
	}
}

// A file whose content is elsewhere is named, not read as what its stream holds.
func TestContentElsewhere(t *testing.T) {
	image := newVolume(t, 64<<20)
	dir, unmount := mount(t, image, "rw,umask=022")
	w := newWriter(t, dir)
	for name, tag := range map[string]uint32{"overlay": 0x80000017, "cloud": 0x9000301a, "unknown": 0x80001234} {
		w.file(name, 100)
		w.must(unix.Setxattr(w.path(name), "system.ntfs_reparse_data", reparsePoint(tag, make([]byte, 16)), 0))
	}
	unmount()
	fsys := diskfs.New(open(t, image))
	for name, want := range map[string]string{"overlay": "Windows Overlay Filter", "cloud": "cloud", "unknown": "0x80001234"} {
		if _, err := fsys.ReadFile(name); !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want it to say %q", name, err, want)
		}
	}
}

// What ntfs-3g makes in the way of WSL is read so: special files and their numbers.
func TestSpecialFilesOfWSL(t *testing.T) {
	image := newVolume(t, 64<<20)
	dir, unmount := mount(t, image, "rw,umask=022,special_files=wsl")
	w := newWriter(t, dir)
	for name, mode := range map[string]uint32{"null": unix.S_IFCHR, "disk": unix.S_IFBLK, "pipe": unix.S_IFIFO, "socket": unix.S_IFSOCK} {
		w.must(unix.Mknod(w.path(name), mode|0o640, int(unix.Mkdev(259, 70000))))
	}
	w.must(os.Symlink("../ünïcode", w.path("link")))
	unmount()
	fsys := diskfs.New(open(t, image))
	for name, want := range map[string]uint32{"null": unix.S_IFCHR, "disk": unix.S_IFBLK, "pipe": unix.S_IFIFO, "socket": unix.S_IFSOCK} {
		st, err := fsys.Lstat(name)
		if err != nil {
			t.Fatal(err)
		}
		s := st.Sys().(*diskfs.Stat)
		if device := want == unix.S_IFCHR || want == unix.S_IFBLK; s.Mode&unix.S_IFMT != want || device && (s.Major != 259 || s.Minor != 70000) {
			t.Errorf("%s: %+v", name, s)
		}
	}
	if to, err := fsys.ReadLink("link"); err != nil || to != "../ünïcode" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
}

func TestStreamsByName(t *testing.T) {
	image := newVolume(t, 64<<20)
	dir, unmount := mount(t, image, "rw,umask=022,streams_interface=windows")
	w := newWriter(t, dir)
	w.file("file", 10)
	want := strings.Repeat("a large stream ", 10000)
	w.must(os.WriteFile(w.path("file:large"), []byte(want), 0o644))
	w.must(os.WriteFile(w.path("file:small"), []byte("small"), 0o644))
	unmount()
	fsys := diskfs.New(open(t, image))
	if b, err := fsys.ReadFile("file:large"); err != nil || string(b) != want {
		t.Errorf("file:large has %d bytes, %v", len(b), err)
	}
	attrs, err := fsys.Xattrs("file")
	if err != nil || len(attrs) != 1 || attrs[0].Name != "user.small" || string(attrs[0].Value) != "small" {
		t.Errorf("attributes are %q, %v; large ones are no attributes", attrs, err)
	}
	if _, err := fsys.Lstat("file:none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a stream that is not there: %v", err)
	}
}

func TestDataRanges(t *testing.T) {
	image := newVolume(t, 128<<20)
	dir, unmount := mount(t, image, "rw,umask=022")
	newWriter(t, dir).basic(0, 100)
	unmount()
	f, err := diskfs.New(open(t, image)).Open("sparse")
	if err != nil {
		t.Fatal(err)
	}
	file, ok := f.(diskfs.File)
	if !ok {
		t.Fatalf("it is %T", f)
	}
	var data int64
	raw, _ := diskfstest.Open(t, image)
	for off := int64(0); ; {
		e, err := file.NextData(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, off = data+e.Length, e.Offset+e.Length
		a, b := make([]byte, e.Length), make([]byte, e.Length)
		if _, err := file.ReadAt(a, e.Offset); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if _, err := raw.ReadAt(b, e.Device); err != nil || string(a) != string(b) {
			t.Errorf("the range at %d is not at %d of the device, %v", e.Offset, e.Device, err)
		}
	}
	if data == 0 || data > 1<<20 {
		t.Errorf("%d bytes are said to be data", data)
	}
}

// restart changes a clean volume's journal to one that was at work.
func restart(t *testing.T, image string, clients, flags uint16) {
	t.Helper()
	f := open(t, image)
	rec, err := f.file(inoLog)
	if err != nil {
		t.Fatal(err)
	}
	s, err := rec.stream(f, attrData, "")
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, 4096)
	copy(page, "RSTR")
	for at, v := range map[int]uint16{4: 30, 6: 9, 16: 4096, 20: 4096, 24: 64, 64 + 12: clients, 64 + 14: flags, 30: 7} {
		le.PutUint16(page[at:], v)
	}
	for i := 1; i <= 8; i++ {
		le.PutUint16(page[i*fixupStride-2:], 7)
	}
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteAt(page, s.runs[0].at*f.clusterSize); err != nil {
		t.Fatal(err)
	}
}

func TestJournal(t *testing.T) {
	for _, c := range []struct {
		name           string
		clients, flags uint16
		clean          bool
	}{
		{"no client", noClient, 0, true},
		{"clean flag", 0, logClean, true},
		{"at work", 0, 0, false},
	} {
		image := newVolume(t, 64<<20)
		restart(t, image, c.clients, c.flags)
		r, size := diskfstest.Open(t, image)
		f, err := Open(r, size, diskfs.Options{})
		if c.clean {
			if err != nil || f.Info().Log != diskfs.LogClean {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if !errors.Is(err, diskfs.ErrDirtyLog) || !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), "$LogFile") {
			t.Errorf("%s: %v", c.name, err)
		}
		if f, err = Open(r, size, diskfs.Options{Stale: true}); err != nil || f.Info().Log != diskfs.LogIgnored {
			t.Errorf("%s, stale: %v", c.name, err)
		}
	}
}

func TestLZNT1(t *testing.T) {
	for _, c := range []struct {
		name      string
		src, want string
		ok        bool
	}{
		// [MS-XCA] 3.3: "F# F# G A A# F# …" repeated.
		{"example", "\x38\xb0\x88\x46\x23\x20\x00\x20\x47\x20\x41\x00\x10\xa2\x47\x01\xa0\x45\x20\x44\x00\x08\x45\x01\x50\x79\x00\xc0\x45\x20\x05\x24\x13\x88\x05\xb4\x02\x4a\x44\xef\x03\x58\x02\x8c\x09\x16\x01\x48\x45\x00\xbe\x00\x9e\x00\x04\x01\x18\x90\x00", "F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E E F# D E F# G F# D E F# G F# E D E A F# F# G A A G F# E D D E F# E D D\x00", true},
		{"plain", "\x02\x30abc", "abc", true},
		{"beyond the end", "\x0f\x30abc", "", false},
		{"copy of nothing", "\x02\xb0\x01\x00\x00", "", false},
		{"from before the start", "\x04\xb0\x02a\x00\x20", "", false},
	} {
		out := make([]byte, chunkSize)
		err := unpackLZNT1(out, []byte(c.src))
		if (err == nil) != c.ok || c.ok && string(out[:len(c.want)]) != c.want {
			t.Errorf("%s: %q, %v", c.name, strings.TrimRight(string(out), "\x00"), err)
		}
	}
}

func TestNames(t *testing.T) {
	for in, want := range map[string]string{
		"a\x00b\x00":           "ab",
		"\x3d\xd8\x00\xde":     "\U0001f600",
		"\x3d\xd8":             "\xed\xa0\xbd",
		"\x3d\xd8a\x00":        "\xed\xa0\xbda",
		"\x00\xde\x3d\xd8":     "\xed\xb8\x80\xed\xa0\xbd",
		"\x03\x26x\x00\x00":    "☃x",
		"\x3d\xd8\x3d\xd8":     "\xed\xa0\xbd\xed\xa0\xbd",
		"\xff\xff\x00\x00":     "\uffff\x00",
		"\x00\xde\x00\x00\x01": "\xed\xb8\x80\x00",
	} {
		if got := text([]byte(in)); got != want {
			t.Errorf("text(%q) = %q, want %q", in, got, want)
		}
	}
}

// TestCutShort opens volumes that end too early.
func TestCutShort(t *testing.T) {
	image := newVolume(t, 64<<20)
	b, err := os.ReadFile(filepath.Clean(image))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 511, 512, 4096, 1 << 20, 63 << 20} {
		if _, err := Open(strings.NewReader(string(b[:n])), int64(n), diskfs.Options{}); err == nil {
			t.Errorf("a volume of %d bytes opens", n)
		}
	}
}

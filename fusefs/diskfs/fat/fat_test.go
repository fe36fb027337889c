//go:build linux

package fat

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// source makes a directory with what FAT can hold.
func source(t testing.TB, files int) string {
	t.Helper()
	dir := t.TempDir()
	rnd := rand.NewChaCha8([32]byte{7})
	write := func(name string, size int) {
		t.Helper()
		b := make([]byte, size)
		rnd.Read(b)
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, b, 0o755),
			os.Chtimes(name, time.Unix(1700000000, 0), time.Unix(1700000000+int64(size)*2, 0))); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []int{0, 1, 511, 512, 513, 2048, 4096, 4097, 100000} {
		write(fmt.Sprintf("size-%d", n), n)
	}
	for _, name := range []string{"UPPER.TXT", "lower.txt", "Mixed.Case", "with space", "dots.in.name.", strings.Repeat("long", 60), "ünïcode ☃", "deep/er/est/file", "thirteenchars", "fourteen chars"} {
		write(strings.TrimSuffix(name, "."), 100)
	}
	for i := range files {
		write(fmt.Sprintf("many/file number %d", i), 10)
	}
	return dir
}

// image makes a volume of a directory with mkfs.vfat and mtools.
func image(t testing.TB, size int64, dir string, args ...string) string {
	t.Helper()
	diskfstest.NeedTool(t, "mkfs.vfat")
	diskfstest.NeedTool(t, "mcopy")
	image := diskfstest.NewImage(t, size)
	diskfstest.Run(t, "mkfs.vfat", append(args, "-n", "MYLABEL", image)...)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("MTOOLS_SKIP_CHECK", "1")
	t.Setenv("TZ", "UTC")
	t.Setenv("LC_ALL", "C.UTF-8")
	for _, e := range entries {
		diskfstest.Run(t, "mcopy", "-s", "-m", "-i", image, filepath.Join(dir, e.Name()), "::")
	}
	return image
}

func TestAgainstSource(t *testing.T) {
	dir := source(t, 150)
	for _, c := range []struct {
		name string
		bits int
		size int64
		args []string
	}{
		{"fat12", 12, 4 << 20, []string{"-F", "12", "-s", "4", "-r", "512"}},
		{"fat16", 16, 64 << 20, []string{"-F", "16"}},
		{"fat32", 32, 64 << 20, []string{"-F", "32", "-s", "1"}},
		{"three tables", 16, 64 << 20, []string{"-F", "16", "-f", "3"}},
		{"fat32-4k-sectors", 32, 300 << 20, []string{"-F", "32", "-S", "4096", "-s", "1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, size := diskfstest.Open(t, image(t, c.size, dir, c.args...))
			f, err := Open(r, size, diskfs.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if f.bits != c.bits || f.Info().Label != "MYLABEL" || len(f.Info().UUID) != 9 {
				t.Errorf("FAT%d, %+v", f.bits, f.Info())
			}
			fsys := diskfs.New(f)
			// FAT keeps only contents, names and even seconds; mtools sets directories' times.
			n := diskfstest.Compare(t, fsys, dir, diskfstest.Options{
				IgnoreIno: true, IgnoreBlocks: true, IgnoreAtime: true, IgnoreCtime: true, IgnoreNlink: true,
				IgnoreDirSize: true, IgnoreDirTimes: true,
			})
			t.Logf("%d entries compared", n)
		})
	}
}

func TestIOFS(t *testing.T) {
	r, size := diskfstest.Open(t, image(t, 4<<20, source(t, 3)))
	f, err := Open(r, size, diskfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := fstest.TestFS(diskfs.New(f), "UPPER.TXT", "deep/er/est/file", "size-0"); err != nil {
		t.Error(err)
	}
}

func TestCodePage(t *testing.T) {
	if len(cp437) != 128 {
		t.Fatalf("%d characters", len(cp437))
	}
	e := []byte("\x81BER    TXT" + strings.Repeat("\x00", 21))
	if got := shortName(e); got != "üBER.TXT" {
		t.Errorf("%q", got)
	}
	e[entryCase] = caseExt
	if got := shortName(e); got != "üBER.txt" {
		t.Errorf("%q", got)
	}
}

// maxAllocated is many times what reading a sound volume takes.
const maxAllocated = 64 << 20

// FuzzImage changes bytes of small volumes and reads all that they offer.
func FuzzImage(f *testing.F) {
	dir := source(f, 5)
	if err := os.RemoveAll(filepath.Join(dir, "size-100000")); err != nil {
		f.Fatal(err)
	}
	type volume struct {
		bytes []byte
		used  []int // pieces of 16 bytes that are not all zeroes
	}
	var volumes []volume
	for _, args := range [][]string{{"-F", "12", "-s", "1", "-r", "512"}, {"-F", "16", "-s", "1", "-r", "512"}, {"-F", "32", "-s", "1"}} {
		// Of the sizes that make mtools see the same type.
		size := map[string]int64{"12": 1 << 20, "16": 4 << 20, "32": 40 << 20}[args[1]]
		b, err := os.ReadFile(image(f, size, dir, args...))
		if err != nil {
			f.Fatal(err)
		}
		v := volume{bytes: b}
		for at := 0; at < len(b); at += 16 {
			if !bytes.Equal(b[at:at+16], make([]byte, 16)) {
				v.used = append(v.used, at)
			}
		}
		f.Add(uint8(len(volumes)), []byte{0, 0, 13, 1})
		volumes = append(volumes, v)
	}
	f.Fuzz(func(t *testing.T, which uint8, script []byte) {
		v := volumes[int(which)%len(volumes)]
		b := v.bytes
		for ; len(script) >= 4; script = script[4:] {
			at := v.used[(int(script[0])<<8|int(script[1]))%len(v.used)] + int(script[2]&15)
			defer func(old byte) { b[at] = old }(b[at]) // in reverse order
			b[at] = script[3]
		}
		diskfstest.Bounded(t, maxAllocated, func() { readSome(t, b) })
	})
}

// readSome reads what a volume that may be damaged offers, up to some bounds.
func readSome(t *testing.T, b []byte) {
	t.Helper()
	vol, err := Open(bytes.NewReader(b), int64(len(b)), diskfs.Options{})
	if err != nil {
		return
	}
	vol.Info()
	fsys, left := diskfs.New(vol), 200
	_ = fs.WalkDir(fsys, ".", func(name string, e fs.DirEntry, err error) error {
		if left--; left < 0 {
			return fs.SkipAll
		}
		if strings.Count(name, "/") > 20 {
			t.Errorf("no end of %q", name)
		}
		if err != nil || e.IsDir() {
			return nil
		}
		file, err := fsys.Open(name)
		if err != nil {
			return nil
		}
		if file, ok := file.(diskfs.File); ok {
			buf := make([]byte, 10000)
			_, _ = file.ReadAt(buf, 0)
			_, _ = file.ReadAt(buf, 1<<31)
			_, _ = file.NextData(100)
		}
		return nil
	})
}

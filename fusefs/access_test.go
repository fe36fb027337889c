package fusefs_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// Another user sees nothing of a mount, and with AllowOther what the files'
// permissions let that user see; the disk itself stays the mounting user's.
func TestAllowOther(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedTool(t, "setpriv")
	image := newVolume(t, 64*mib, slices.Clone(mkExt4), 3)
	dir, unmount := diskfstest.Mount(t, image, "")
	own := filepath.Join(dir, "own")
	if err := errors.Join(os.WriteFile(own, []byte("mine"), 0o600), os.Chown(own, 4711, 4711)); err != nil {
		t.Fatal(err)
	}
	unmount()
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	for _, allow := range []bool{false, true} {
		m := mount(t, repo, fusefs.Options{AllowOther: allow})
		for d := filepath.Dir(m.Dir); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
			if err := os.Chmod(d, 0o755); err != nil { // so that another user gets to the mount
				t.Fatal(err)
			}
		}
		for name, readable := range map[string]bool{
			"files/many/file-00001": allow, "files/own": allow, "info.json": allow,
			"files/a/b/c/data": false, "files/tool": allow, "disk.img": false,
		} {
			out, err := exec.Command("setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", "--", "cat", m.latest(shopDB, name)).CombinedOutput()
			if (err == nil) != readable || !readable && !strings.Contains(string(out), "Permission denied") {
				t.Errorf("AllowOther %v: %s read by another user: %v, %.100q", allow, name, err, out)
			}
		}
		if b, err := os.ReadFile(m.latest(shopDB, "files/own")); err != nil || string(b) != "mine" {
			t.Errorf("AllowOther %v: the mounting user reads %q, %v", allow, b, err)
		}
	}
}

// What was read once is in the kernel's page cache, which outlives closing the file: a
// second reader costs nothing, although nothing is kept by this process.
func TestPageCacheOutlivesClosing(t *testing.T) {
	image := newVolume(t, 64*mib, slices.Clone(mkExt4), 3)
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{CacheBytes: 1})
	// The names above a point are looked up anew after a second; those below it are not, as
	// long as it is open.
	dir, err := os.OpenRoot(m.latest(shopDB, "."))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, name := range []string{"disk.img", "files/a/b/c/data"} {
		read := func(forget bool) int64 {
			t.Helper()
			before := m.info(t, shopDB).Fetched.Bytes
			f, err := dir.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			// Without read-ahead, which could still be going on after the read.
			if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
				t.Fatal(err)
			}
			if forget {
				if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := f.ReadAt(make([]byte, 2*mib), 0); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			return m.info(t, shopDB).Fetched.Bytes - before
		}
		if n := read(false); n == 0 {
			t.Errorf("%s: the first reader fetched nothing", name)
		}
		// What the image read ahead for the first reader may still be coming, and is counted
		// as the next one's. That has an end; reads that reach this process have none.
		var n int64
		for range 100 {
			if n = read(false); n == 0 {
				break
			}
		}
		if n != 0 {
			t.Errorf("%s: reader after reader fetches, the last one %d bytes", name, n)
		}
		if n := read(true); n == 0 {
			t.Errorf("%s: without the page cache nothing was fetched: this process keeps blocks, and the test proves nothing", name)
		}
	}
}

// A directory that is inside itself is an error where it stands; a walk has an end.
func TestDirectoryInsideItself(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedTool(t, "debugfs")
	image := newVolume(t, 64*mib, slices.Clone(mkExt4), 3)
	diskfstest.Run(t, "debugfs", "-w", "-R", "ln /a /a/b/loop", image)
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{})
	out, err := exec.CommandContext(t.Context(), "find", m.latest(shopDB, "files/a/"), "-printf", "%P\n").Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Errorf("find met no error: %v", err)
	}
	got := strings.Fields(string(out))
	slices.Sort(got)
	if want := []string{"b", "b/c", "b/c/data", "b/loop", "hard"}; !slices.Equal(got, want) && !slices.Equal(got, slices.DeleteFunc(want, func(s string) bool { return s == "b/loop" })) {
		t.Errorf("find shows %q, want %q", got, want)
	}
}

package fusefs_test

import (
	"errors"
	"fmt"
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

// Another user sees nothing of a mount, and with AllowOther what the files' permissions
// allow; the disk itself stays reserved for the mounting user.
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
		letPass(t, m.Dir)
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

// Access lists decide as under the kernel's own driver: the group bits of a mode are a list's
// mask, and one user can be allowed or refused.
func TestAllowOtherByAccessLists(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedTool(t, "setpriv")
	diskfstest.NeedTool(t, "setfacl")
	lists := []string{"u:1234:r", "u:65534:---", "g:4711:---", "u:1234:---", "g:4711:r", "m::---"}
	for _, mkfs := range [][]string{mkExt4, mkXFS} {
		t.Run(mkfs[0], func(t *testing.T) {
			image := newVolume(t, 512*mib, slices.Clone(mkfs), 3)
			dir, unmount := diskfstest.Mount(t, image, "")
			var names []string
			for i, list := range lists {
				for _, mode := range []os.FileMode{0o600, 0o644} {
					name := fmt.Sprintf("list-%d-%o", i, mode)
					names = append(names, name, name+".d/file")
					file, sub := filepath.Join(dir, name), filepath.Join(dir, name+".d")
					if err := errors.Join(os.WriteFile(file, nil, mode), os.Chown(file, 0, 65534),
						os.Mkdir(sub, mode|0o100), os.Chown(sub, 0, 65534), os.WriteFile(filepath.Join(sub, "file"), nil, 0o644)); err != nil {
						t.Fatal(err)
					}
					diskfstest.Run(t, "setfacl", "-m", list, file)
					diskfstest.Run(t, "setfacl", "-m", strings.Replace(list, ":r", ":rx", 1), sub)
				}
			}
			want := readableByOthers(t, dir, names)
			unmount()
			repo := repotest.New(t).Open(t)
			save(t, repo, shopDB, image)
			m := mount(t, repo, fusefs.Options{AllowOther: true})
			letPass(t, m.Dir)
			got := readableByOthers(t, m.latest(shopDB, "files"), names)
			for who, can := range want {
				if got[who] != can {
					t.Errorf("%s: read %v, and %v under the kernel's driver", who, got[who], can)
				}
			}
			if !want["list-0-600 by 1234:1234"] || want["list-0-600 by 65534:65534"] {
				t.Errorf("the lists admit %v", want)
			}
		})
	}
}

// readableByOthers lists the files below a directory that some users can read.
func readableByOthers(t *testing.T, dir string, names []string) map[string]bool {
	t.Helper()
	letPass(t, dir)
	can := map[string]bool{}
	for _, ids := range []string{"65534:65534", "1234:1234", "4711:4711", "1234:65534"} {
		uid, gid, _ := strings.Cut(ids, ":")
		for _, name := range names {
			out, err := exec.Command("setpriv", "--reuid="+uid, "--regid="+gid, "--clear-groups", "--", "cat", filepath.Join(dir, name)).CombinedOutput()
			if err != nil && !strings.Contains(string(out), "Permission denied") {
				t.Errorf("%s read by %s: %v, %s", name, ids, err, out)
			}
			can[name+" by "+ids] = err == nil
		}
	}
	return can
}

// letPass gives other users access to a directory of a test.
func letPass(t *testing.T, dir string) {
	t.Helper()
	for d := filepath.Dir(dir); strings.HasPrefix(d, os.TempDir()+"/"); d = filepath.Dir(d) {
		if st, err := os.Stat(d); err != nil || st.Mode()&0o005 == 0o005 {
			continue // such as the directories of a mount
		}
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// What was read once is in the kernel's page cache, which survives closing the file: a second
// reader costs nothing, although this process keeps nothing.
func TestPageCacheOutlivesClosing(t *testing.T) {
	image := newVolume(t, 64*mib, slices.Clone(mkExt4), 3)
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{CacheBytes: 1})
	// The names above a point are looked up again after a second; those below it are not, as
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
			// Without read-ahead, which could still run after the read.
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
		// What the image read ahead for the first reader may still arrive, and is counted for
		// the next one. That ends; reads that reach this process do not.
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

// A directory inside itself is an error at its place; a walk ends.
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

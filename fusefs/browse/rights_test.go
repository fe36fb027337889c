package browse_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestCopyGivesNoRights: an untrusted image grants no rights on this machine, unless the
// caller says so.
func TestCopyGivesNoRights(t *testing.T) {
	diskfstest.NeedRoot(t)
	fsys := newFiles(t, map[string][]byte{"tool": []byte("1"), "group": []byte("2"), "plain": []byte("3"), "shared/file": []byte("4")},
		"mknod disk b 8 0", "mknod mem c 1 1", "ln mem mem2", "sif mem links_count 2", "mknod pipe p",
		"sif tool mode 0104755", "sif group mode 0102755", "sif shared mode 0042775",
		`ea_set plain security.capability "\001\000\000\002\000\004\000\000\000\000\000\000\000\000\000\000\000\000\000\000"`)
	mode := func(path string) uint32 {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Mode
	}
	target := filepath.Join(t.TempDir(), "copy")
	var mu sync.Mutex
	var warned []string
	res, err := browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{Recursive: true, Warn: func(name string, err error) {
		mu.Lock()
		defer mu.Unlock()
		if !strings.Contains(err.Error(), "device node") {
			t.Errorf("%s: %v", name, err)
		}
		warned = append(warned, name)
	}})
	slices.Sort(warned)
	if err != nil || res.DevicesLeft != 3 || res.SetIDLost != 3 || !slices.Equal(warned, []string{"disk", "mem", "mem2"}) {
		t.Errorf("%+v, %v, %q", res, err, warned)
	}
	for _, name := range warned {
		if _, err := os.Lstat(filepath.Join(target, name)); err == nil {
			t.Errorf("%s was made", name)
		}
	}
	for name, want := range map[string]uint32{"tool": unix.S_IFREG | 0o755, "group": unix.S_IFREG | 0o755, "shared": unix.S_IFDIR | 0o2775, "pipe": unix.S_IFIFO} {
		if got := mode(filepath.Join(target, name)); got != want && got&unix.S_IFMT != unix.S_IFIFO {
			t.Errorf("%s has mode %o, want %o", name, got, want)
		}
	}
	if n, err := unix.Getxattr(filepath.Join(target, "plain"), "security.capability", nil); err == nil {
		t.Errorf("the capabilities were kept: %d bytes", n)
	}

	target = filepath.Join(t.TempDir(), "all")
	res, err = browse.Copy(t.Context(), fsys, ".", target, browse.CopyOptions{Recursive: true, Devices: true, SetID: true, Warn: func(name string, err error) {
		t.Errorf("%s: %v", name, err)
	}})
	if err != nil || res.DevicesLeft != 0 || res.SetIDLost != 0 {
		t.Errorf("%+v, %v", res, err)
	}
	for name, want := range map[string]uint32{"tool": unix.S_IFREG | 0o4755, "group": unix.S_IFREG | 0o2755} {
		if got := mode(filepath.Join(target, name)); got != want {
			t.Errorf("%s has mode %o, want %o", name, got, want)
		}
	}
	if mode(filepath.Join(target, "disk"))&unix.S_IFMT != unix.S_IFBLK || mode(filepath.Join(target, "mem2"))&unix.S_IFMT != unix.S_IFCHR {
		t.Error("device nodes were not made")
	}
	if _, err := unix.Getxattr(filepath.Join(target, "plain"), "security.capability", nil); err != nil {
		t.Errorf("the capabilities were not kept: %v", err)
	}
}

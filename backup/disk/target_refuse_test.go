package disk

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTargetRefusals(t *testing.T) {
	if _, err := OpenTarget("/dev/varve-no-such-device", TargetOptions{Size: 1}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing device = %v", err)
	}

	if _, err := os.Stat("/dev/varve-no-such-device"); err == nil {
		t.Error("a file was made in /dev")
	}

	if _, err := OpenTarget(filepath.Join(t.TempDir(), "x"), TargetOptions{Size: -1}); err == nil {
		t.Error("a negative size was accepted")
	}

	if _, err := OpenTarget(filepath.Join(t.TempDir(), "none", "x"), TargetOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory = %v", err)
	}

	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("gone.img", link); err != nil {
		t.Fatal(err)
	}

	if _, err := OpenTarget(link, TargetOptions{}); !errors.Is(err, ErrNotADisk) || !strings.Contains(err.Error(), "symbolic link to gone.img") {
		t.Errorf("a link to nothing = %v", err)
	}

	huge := filepath.Join(t.TempDir(), "huge")
	if _, err := OpenTarget(huge, TargetOptions{Size: 1<<63 - 1}); err == nil {
		t.Error("a file of 8 EiB was made")
	} else if _, err := os.Stat(huge); err == nil {
		t.Error("the file of a failed opening is left over")
	}

	target := openTarget(t, filepath.Join(t.TempDir(), "x"), TargetOptions{Size: 1000})
	for _, c := range [][2]int64{{-1, 1}, {1000, 1}, {999, 2}, {1 << 62, 1 << 62}} {
		if err := target.ZeroRange(c[0], c[1]); err == nil {
			t.Errorf("ZeroRange%v was accepted", c)
		}

		if _, err := target.WriteAt(make([]byte, min(c[1], 10)), c[0]); err == nil {
			t.Errorf("WriteAt%v was accepted", c)
		}
	}

	device := loop(t, tempFile(t, make([]byte, 1<<20)))
	for _, force := range []bool{false, true} {
		if _, err := OpenTarget(device, TargetOptions{Size: 1<<20 + 1, Force: force}); !errors.Is(err, ErrTooSmall) {
			t.Errorf("a device that is too small = %v, want %v", err, ErrTooSmall)
		}
	}

	openTarget(t, device, TargetOptions{Size: 1<<20 - 512})
}

// TestTargetIsLocked: two writers to one file at once would leave neither's bytes.
func TestTargetIsLocked(t *testing.T) {
	old := random(5000, 1)
	path := tempFile(t, old)
	first := openTarget(t, path, TargetOptions{Size: 3000, Keep: true})

	for _, keep := range []bool{false, true} {
		_, err := OpenTarget(path, TargetOptions{Size: 1000, Keep: keep})

		var used *InUseError
		if !errors.As(err, &used) || used.Uses[0].Kind != Locked || !strings.Contains(err.Error(), path) {
			t.Errorf("keep %v: %v", keep, err)
		}
	}

	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, old) {
		t.Errorf("the file was changed: %v", err)
	}

	forced := openTarget(t, path, TargetOptions{Size: 3000, Keep: true, Force: true})
	if err := errors.Join(forced.Close(), first.Close()); err != nil {
		t.Fatal(err)
	}

	fresh := filepath.Join(t.TempDir(), "new.img")
	openTarget(t, fresh, TargetOptions{Size: 1000})

	if _, err := OpenTarget(fresh, TargetOptions{Size: 1000}); !errors.Is(err, ErrMounted) {
		t.Errorf("a file that was just made: %v", err)
	}

	openTarget(t, path, TargetOptions{Size: 3000, Keep: true})
}

func TestTargetRemoveUnused(t *testing.T) {
	dir := t.TempDir()

	for name, c := range map[string]struct {
		begin func(*Target) error
		stays bool
	}{
		"unused":  {func(*Target) error { return nil }, false},
		"fitted":  {(*Target).Fit, true},
		"written": {func(t *Target) error { _, err := t.WriteAt([]byte{1}, 0); return err }, true},
		"another": {func(t *Target) error {
			return errors.Join(os.Rename(t.Path(), t.Path()+".old"), os.WriteFile(t.Path(), nil, 0o600))
		}, true},
	} {
		path := filepath.Join(dir, name)
		target := openTarget(t, path, TargetOptions{Size: 1000, Keep: true})

		if err := errors.Join(c.begin(target), target.RemoveUnused()); err != nil {
			t.Fatal(err)
		}

		if _, err := os.Stat(path); (err == nil) != c.stays {
			t.Errorf("%s: %v", name, err)
		}
	}

	old := tempFile(t, nil)
	if err := openTarget(t, old, TargetOptions{Size: 1000, Keep: true}).RemoveUnused(); err != nil {
		t.Fatal(err)
	}

	if _, err := os.Stat(old); err != nil {
		t.Errorf("an empty file that was there: %v", err)
	}
}

func TestTargetReadOnlyDevice(t *testing.T) {
	device := loop(t, tempFile(t, make([]byte, 1<<20)), "-r")

	if _, err := OpenTarget(device, TargetOptions{Size: 1 << 20}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("OpenTarget of a write-protected device = %v, want %v", err, ErrReadOnly)
	}
}

func TestTargetIdentity(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	a := openTarget(t, path, TargetOptions{Size: 1000})
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}

	again := openTarget(t, path, TargetOptions{Size: 1000, Keep: true})
	b := openTarget(t, filepath.Join(dir, "b"), TargetOptions{Size: 1000})

	if a.Identity() != again.Identity() || a.Identity() == b.Identity() || a.Identity() == "" {
		t.Errorf("identities: %q, again %q, another file %q", a.Identity(), again.Identity(), b.Identity())
	}

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}

	if anew := openTarget(t, path, TargetOptions{Size: 1000}); anew.Identity() == a.Identity() {
		t.Errorf("a new file of the same name has the identity of the old one: %q", a.Identity())
	}

	image1, image2 := tempFile(t, make([]byte, 1<<20)), tempFile(t, make([]byte, 1<<20))
	c := openTarget(t, loop(t, image1), TargetOptions{Size: 1 << 20})
	d := openTarget(t, loop(t, image2), TargetOptions{Size: 1 << 20})

	if c.Identity() == d.Identity() {
		t.Errorf("two devices have the identity %q", c.Identity())
	}
}

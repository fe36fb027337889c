package faults

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/varve-io/varve/internal/mounttest"
)

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts and loop devices need root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skipf("no loop devices here: %v", err)
	}
}

// lockLoops keeps other packages' tests from using the few loop devices; it is released
// once the test has detached its own.
func lockLoops(t *testing.T) {
	t.Helper()
	needRoot(t)
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "varve-loop-devices.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
}

// loop attaches a loop device to a file until the test ends. The caller holds
// the lock.
func loop(t *testing.T, file string, options ...string) string {
	t.Helper()
	dev := command(t, "losetup", append(append([]string{"--show", "-f"}, options...), file)...)
	t.Cleanup(func() { command(t, "losetup", "-d", dev) })
	return dev
}

// mount mounts until the test ends and returns where.
func mount(t *testing.T, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	command(t, "mount", append(args, dir)...)
	t.Cleanup(func() { mounttest.Unmount(t, dir) })
	return dir
}

// TestBadSector backs up a device whose end cannot be read: a loop device over a file
// that was truncated later.
func TestBadSector(t *testing.T) {
	lockLoops(t)
	const size, good = 4 << 20, 3<<20 + 64<<10
	s := newSite(t, "", size)
	s.backup()
	dev := loop(t, s.disk, "--direct-io=on")
	if err := os.Truncate(s.disk, good); err != nil {
		t.Fatal(err)
	}
	r := s.run("backup", dev, "--volume", volume)
	if r.code != 1 || !strings.Contains(r.stderr, dev) || !strings.Contains(r.stderr, "at offset 3211264") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	s.check()
	s.data = bytes.Clone(s.data)
	clear(s.data[good:])
	p := s.made(s.varve("backup", dev, "--volume", volume, "--on-read-error", "zero", "-o", "json"))
	at := int64(good)
	for _, e := range p.ReadErrors {
		if e.Offset != at {
			t.Errorf("a range of %d bytes at %d, not at %d", e.Length, e.Offset, at)
		}
		at = e.Offset + e.Length
	}
	if at != size {
		t.Errorf("the ranges end at %d: %v", at, p.ReadErrors)
	}
	s.check()
	if out := s.varve("show", p.ID); !strings.Contains(out, "read") {
		t.Errorf("show says nothing of it: %s", out)
	}
}

// TestLargeSectors backs up and restores a device with logical blocks of 4096
// bytes.
func TestLargeSectors(t *testing.T) {
	lockLoops(t)
	const size = 8<<20 + 4096
	s := newSite(t, "", size)
	dev := loop(t, s.disk, "--sector-size", "4096", "--direct-io=on")
	full := s.made(s.varve("backup", dev, "--volume", volume, "-o", "json"))
	s.scribble(5<<20+4096, 8192)
	command(t, "blockdev", "--flushbufs", dev)
	p := s.made(s.varve("backup", dev, "--volume", volume, "-o", "json"))
	if full.Kind != "full" || p.Kind != "incremental" {
		t.Errorf("points are %s and %s", full.Kind, p.Kind)
	}
	s.check()
	target := filepath.Join(s.dir, "target.img")
	if err := os.WriteFile(target, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	to := loop(t, target, "--sector-size", "4096", "--direct-io=on")
	for _, id := range []string{full.ID, p.ID} {
		s.varve("restore", id, to, "--verify")
		got, err := os.ReadFile(to)
		if err != nil || !bytes.Equal(got, s.want[id]) {
			t.Errorf("%s is not on the device: %v", id, err)
		}
	}
	s.varve("restore", full.ID, to, "--delta", "--base", p.ID, "--verify")
	if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, s.want[full.ID]) {
		t.Errorf("the first point is not on the device: %v", err)
	}
}

// TestMountedDevice: a mounted device is refused as source and as target.
func TestMountedDevice(t *testing.T) {
	lockLoops(t)
	s := newSite(t, "", 8<<20)
	first := s.backup()
	file := filepath.Join(s.dir, "ext4.img")
	if err := os.WriteFile(file, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	command(t, "mkfs.ext4", "-q", "-F", file)
	dev := loop(t, file)
	mount(t, dev)
	if r := s.run("backup", dev, "--volume", "shop/live"); r.code != 6 || !strings.Contains(r.stderr, "--live") {
		t.Errorf("backup: exit code %d: %s", r.code, r.stderr)
	}
	if r := s.run("restore", first.ID, dev); r.code != 6 || !strings.Contains(r.stderr, "mounted") {
		t.Errorf("restore: exit code %d: %s", r.code, r.stderr)
	}
	s.check()
	p := s.made(s.varve("backup", dev, "--volume", "shop/live", "--live", "-o", "json"))
	if !p.NotCrashConsistent {
		t.Error("the point is not marked")
	}
	if out := s.varve("show", p.ID); !strings.Contains(out, "written to while it was read") {
		t.Errorf("show says nothing of it: %s", out)
	}
}

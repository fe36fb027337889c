package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup"
)

// loopOf attaches a file as a block device.
func loopOf(t *testing.T, path string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a loop device")
	}
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Skipf("needs loop devices: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "--detach", device).Run() })
	return device
}

// formatted makes a file formatted by a tool.
func formatted(t *testing.T, size int64, tool string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Skipf("needs %s: %v", tool, err)
	}
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool, append(args, path)...)
	cmd.Stdin = strings.NewReader("label: gpt\nsize=1MiB\n") // for sfdisk
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", tool, err, out)
	}
	return path
}

// TestRestoreAsksBeforeADevice refuses a device with any known signature, and names it.
func TestRestoreAsksBeforeADevice(t *testing.T) {
	env, disk := newBackupEnv(t) // without any signature
	backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	for _, c := range []struct {
		says string
		tool []string
	}{
		{`an ext4 file system "precious"`, []string{"mke2fs", "-q", "-F", "-t", "ext4", "-L", "precious"}},
		{"swap space", []string{"mkswap", "-q"}},
		{"a GPT partition table with 1 partition", []string{"sfdisk", "-q"}},
	} {
		file := formatted(t, 4<<20, c.tool[0], c.tool[1:]...)
		before, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		device := loopOf(t, file)
		for _, args := range [][]string{
			{"restore", "shop/db@latest", device},
			{"restore", "shop/db@latest", device, "--restart"},
			{"restore", "shop/db@latest", device, "--delta"},
			{"restore", "shop/db@latest", device, "--force"},
		} {
			r := runVarve(t, env, args...)
			if r.code != exitRefused || !strings.Contains(r.stderr, c.says) || !strings.Contains(r.stderr, "--overwrite") {
				t.Errorf("%v: exit code %d, %s", args, r.code, r.stderr)
			}
		}
		after, err := os.ReadFile(file)
		if err != nil || string(after) != string(before) {
			t.Errorf("%s: the device was changed (%v)", c.says, err)
		}
		r := mustRun(t, env, "restore", "shop/db@latest", device, "--overwrite", "--verify")
		if !strings.Contains(r.stdout, "3 MiB larger than the disk") {
			t.Errorf("nothing is said of the device's tail: %s", r.stdout)
		}
	}
}

// TestRestoreOntoItself writes a delta to a device that holds an older state of the disk, and
// a full restore onto a blank one, without --overwrite.
func TestRestoreOntoItself(t *testing.T) {
	env, _ := newBackupEnv(t)
	disk := formatted(t, 4<<20, "mke2fs", "-q", "-F", "-t", "ext4")
	backupJSON(t, env, disk, "--volume", "shop/fs", "--block-size", "64K")
	blank := filepath.Join(t.TempDir(), "blank")
	if err := os.WriteFile(blank, make([]byte, 6<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	device := loopOf(t, blank)
	r := mustRun(t, env, "restore", "shop/fs@latest", device)
	if !strings.Contains(r.stdout, "resize2fs "+device) {
		t.Errorf("nothing is said of growing: %s", r.stdout)
	}
	changeByte(t, device, 3_000_000)
	mustRun(t, env, "restore", "shop/fs@latest", device, "--delta", "--verify")
	mustRun(t, env, "restore", "shop/fs@latest", device, "--delta", "--base", "shop/fs@latest", "--verify")
	if r := runVarve(t, env, "restore", "shop/fs@latest", device); r.code != exitRefused {
		t.Errorf("a full restore over the same file system: exit code %d, %s", r.code, r.stderr)
	}
	// The same for a file.
	other := formatted(t, 4<<20, "mke2fs", "-q", "-F", "-t", "ext4")
	for _, args := range [][]string{{"--delta"}, {"--delta", "--base", "shop/fs@latest", "--verify-unchanged", "0"}} {
		r := runVarve(t, env, append([]string{"restore", "shop/fs@latest", other}, args...)...)
		if r.code != exitRefused || !strings.Contains(r.stderr, "not the disk of shop/fs@") {
			t.Errorf("%v onto another file system: exit code %d, %s", args, r.code, r.stderr)
		}
	}
	mustRun(t, env, "restore", "shop/fs@latest", other, "--delta", "--overwrite", "--verify")
}

// TestRestoreTailHides warns of metadata at the end of a larger device that hides the disk.
func TestRestoreTailHides(t *testing.T) {
	env, _ := newBackupEnv(t)
	disk := formatted(t, 4<<20, "mke2fs", "-q", "-F", "-t", "ext4")
	backupJSON(t, env, disk, "--volume", "shop/fs", "--block-size", "64K")
	b := make([]byte, 6<<20)
	copy(b[len(b)-1024:], "Intel Raid ISM Cfg Sig. 1.3.00")
	path := filepath.Join(t.TempDir(), "raid")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	device := loopOf(t, path)
	if r := runVarve(t, env, "restore", "shop/fs@latest", device); r.code != exitRefused || !strings.Contains(r.stderr, "Intel firmware RAID") {
		t.Errorf("exit code %d, %s", r.code, r.stderr)
	}
	if r := mustRun(t, env, "restore", "shop/fs@latest", device, "--overwrite"); !strings.Contains(r.stdout, "hides the restored disk") {
		t.Errorf("nothing is said of the RAID: %s", r.stdout)
	}
}

// TestJournalOfAnotherDevice: a journal counts only for its device.
func TestJournalOfAnotherDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	if got := backup.JournalTarget(path); got != "" {
		t.Errorf("no journal is of %q", got)
	}
	if err := os.WriteFile(path, []byte(`{"format":"varve-restore/1","target":"device 7:1"}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := backup.JournalTarget(path); got != "device 7:1" {
		t.Errorf("the journal is of %q", got)
	}
}

// TestNBDReadAsksBeforeADevice: so does every other command that writes to a device.
func TestNBDReadAsksBeforeADevice(t *testing.T) {
	device := loopOf(t, formatted(t, 4<<20, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "precious"))
	if err := mayReplace(device, false); !errors.Is(err, errTargetExists) || !strings.Contains(err.Error(), `"precious"`) {
		t.Errorf("%v", err)
	}
	if err := mayReplace(device, true); err != nil {
		t.Errorf("with --overwrite: %v", err)
	}
}

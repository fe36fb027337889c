package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

func qemuTool(t *testing.T, name string, args ...string) {
	t.Helper()
	diskfstest.NeedTool(t, name)
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// TestBackupOfImages backs a qcow2 up by its bitmap and restores it to each format; qemu-img
// compares them.
func TestBackupOfImages(t *testing.T) {
	env, _ := newBackupEnv(t)
	dir := env["HOME"]
	vm := filepath.Join(dir, "vm.qcow2")
	qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", vm, "48M")
	qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 20M", vm)
	if res := backupJSON(t, env, vm, "--volume", "shop/vm", "--track"); res.Kind != "full" || res.Disk != "qcow2 image" || res.Source != "allocation" {
		t.Errorf("the full: %+v", res)
	}
	qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 5M 1M", "-c", "write -z 10M 2M", vm)
	out := mustRun(t, env, "backup", vm, "--volume", "shop/vm").stdout
	if !strings.Contains(out, "incremental backup") || !strings.Contains(out, "qcow2 image, changes by bitmap") {
		t.Errorf("the increment:\n%s", out)
	}
	qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 3M 128k", vm)
	out = mustRun(t, env, "source", "info", vm, "--volume", "shop/vm").stdout
	if !strings.Contains(out, "qcow2 image of 48 MiB") || !strings.Contains(out, "reads 128 KiB, changes by bitmap") {
		t.Errorf("the source:\n%s", out)
	}
	mustRun(t, env, "backup", vm, "--volume", "shop/vm")
	if out = mustRun(t, env, "source", "forget", vm, "--volume", "shop/other").stdout; !strings.Contains(out, "nothing of Varve's") {
		t.Errorf("what was forgotten of another volume:\n%s", out)
	}
	if out = mustRun(t, env, "source", "forget", vm, "--volume", "shop/vm").stdout; strings.Count(out, "removed varve-") != 1 {
		t.Errorf("what was forgotten:\n%s", out)
	}
	if out = mustRun(t, env, "source", "info", vm, "--volume", "shop/vm").stdout; !strings.Contains(out, "changes by allocation") || !strings.Contains(out, "has no bitmap") {
		t.Errorf("the source without its bitmap:\n%s", out)
	}
	for _, format := range []string{"qcow2", "vmdk", "vhdx", "vdi", "vpc"} {
		to := filepath.Join(dir, "back."+format)
		mustRun(t, env, "restore", "shop/vm@latest", to, "--format", format, "--verify")
		qemuTool(t, "qemu-img", "compare", "-f", format, "-F", "qcow2", to, vm)
		if r := runVarve(t, env, "restore", "shop/vm@latest", to, "--format", format); r.code != exitRefused || !strings.Contains(r.stderr, "--overwrite") {
			t.Errorf("over an image that exists: exit code %d\n%s", r.code, r.stderr)
		}
	}
	back := filepath.Join(dir, "back.qcow2")
	qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "write -P 7 30M 1M", back)
	mustRun(t, env, "restore", "shop/vm@latest", back, "--format", "qcow2", "--delta", "--verify")
	qemuTool(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", back, vm)
	if r := runVarve(t, env, "restore", "shop/vm@latest", filepath.Join(dir, "new.qcow2")); r.code != exitUsage || !strings.Contains(r.stderr, "--format qcow2") {
		t.Errorf("a name without its format: exit code %d\n%s", r.code, r.stderr)
	}

	// A failed restore leaves nothing.
	if r := runVarve(t, env, "restore", "shop/vm@latest", filepath.Join(dir, "back.vmdk", "x"), "--format", "vmdk"); r.code == exitOK {
		t.Error("a folder that is none was restored to")
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.Contains(f.Name(), "varve-") {
			t.Errorf("%s is left", f.Name())
		}
	}

	// The image of another machine is in use.
	cmd := exec.Command("qemu-nbd", "-t", "-f", "qcow2", "-k", filepath.Join(t.TempDir(), "s"), "--pid-file", filepath.Join(dir, "pid"), vm)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	waitUntil(t, "qemu-nbd has the image", func() bool { _, err := os.Stat(filepath.Join(dir, "pid")); return err == nil })
	if r := runVarve(t, env, "backup", vm, "--volume", "shop/vm"); r.code != exitRefused || !strings.Contains(r.stderr, "nbd://") {
		t.Errorf("an image in use: exit code %d\n%s", r.code, r.stderr)
	}
	if r := runVarve(t, env, "restore", "shop/vm@latest", vm, "--format", "qcow2", "--delta"); r.code != exitRefused {
		t.Errorf("a target in use: exit code %d\n%s", r.code, r.stderr)
	}
	before, err := os.Stat(vm)
	if err != nil {
		t.Fatal(err)
	}
	if r := runVarve(t, env, "restore", "shop/vm@latest", vm, "--format", "qcow2", "--overwrite"); r.code != exitRefused || !strings.Contains(r.stderr, "--force") {
		t.Errorf("an image in use is replaced: exit code %d\n%s", r.code, r.stderr)
	}
	if after, err := os.Stat(vm); err != nil || !os.SameFile(before, after) {
		t.Errorf("the machine's image has lost its name: %v", err)
	}
}

// TestGroupBitmaps gives each member of a group bitmaps of its own volume, so that one can be
// backed up alone later.
func TestGroupBitmaps(t *testing.T) {
	env, _ := newBackupEnv(t)
	dir := env["HOME"]
	root, data := filepath.Join(dir, "root.qcow2"), filepath.Join(dir, "data.qcow2")
	for _, image := range []string{root, data} {
		qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
		qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", image)
	}
	mustRun(t, env, "backup", root, "disk="+data, "--volume", "shop/vm", "--track")
	for image, volume := range map[string]string{root: "shop/vm-root", data: "shop/vm-disk"} {
		qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", image)
		if res := backupJSON(t, env, image, "--volume", volume); res.Kind != "incremental" || res.Source != "bitmap" || len(res.Fallbacks) > 0 {
			t.Errorf("%s: %+v", volume, res)
		}
		if out := mustRun(t, env, "source", "forget", image, "--volume", "shop/vm").stdout; !strings.Contains(out, "nothing of Varve's") {
			t.Errorf("what the group's name tracks:\n%s", out)
		}
		if out := mustRun(t, env, "source", "forget", image, "--volume", volume).stdout; strings.Count(out, "removed") != 1 {
			t.Errorf("what %s tracks:\n%s", volume, out)
		}
	}
}

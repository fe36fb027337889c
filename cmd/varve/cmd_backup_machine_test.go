package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// startMachine starts a qemu-storage-daemon with two disks of 4 MiB, vda (qcow2) and vdb (raw),
// which a guest would write to as the files of these names in dir. It returns its monitor.
func startMachine(t *testing.T, dir string) (monitor string) {
	t.Helper()
	diskfstest.NeedTool(t, "qemu-storage-daemon")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no FUSE here: a guest's writes go through it")
	}
	monitor = filepath.Join(dir, "qmp")
	args := []string{"--chardev", "socket,path=" + monitor + ",server=on,wait=off,id=c", "--monitor", "chardev=c"}
	for name, format := range map[string]string{"vda": "qcow2", "vdb": "raw"} {
		image, mount := filepath.Join(dir, name+"."+format), filepath.Join(dir, name)
		qemuTool(t, "qemu-img", "create", "-q", "-f", format, image, "4M")
		if err := os.WriteFile(mount, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--blockdev", "driver=file,filename="+image+",node-name="+name+"-file",
			"--blockdev", "driver="+format+",file="+name+"-file,node-name="+name,
			"--export", "type=fuse,id="+name+",node-name="+name+",mountpoint="+mount+",writable=on")
	}
	cmd := exec.Command("qemu-storage-daemon", args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Signal(os.Interrupt); _ = cmd.Wait() })
	waitUntil(t, "the machine's disks are there", func() bool {
		for _, name := range []string{"vda", "vdb"} {
			if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Size() != 4<<20 {
				return false
			}
		}
		_, err := os.Stat(monitor)
		return err == nil
	})
	return monitor
}

// TestBackupOfMachine backs up all disks of a machine as a group, by bitmaps, and restores them.
func TestBackupOfMachine(t *testing.T) {
	env, _ := newBackupEnv(t)
	dir := t.TempDir()
	uri := "qemu+qmp://" + startMachine(t, dir)
	for i, name := range []string{"vda", "vdb"} {
		overwrite(t, filepath.Join(dir, name), bytes.Repeat([]byte{byte(i + 1)}, 2<<20), 0)
	}
	out := mustRun(t, env, "backup", uri, "--volume", "shop/vm", "--scratch", dir).stdout
	for _, want := range []string{"full backup shop/vm-vda@", "full backup shop/vm-vdb@", "qcow2 disk of a running QEMU, changes by allocation", "group shop/vm@", "2 recovery points"} {
		if !strings.Contains(out, want) {
			t.Errorf("%s is missing:\n%s", want, out)
		}
	}
	overwrite(t, filepath.Join(dir, "vda"), bytes.Repeat([]byte{9}, 100), 1<<20)
	out = mustRun(t, env, "source", "info", uri, "--volume", "shop/vm").stdout
	for _, want := range []string{"vda: qcow2 disk of a running QEMU of 4 MiB", "reads 64 KiB, changes by bitmap", "vdb: raw disk", "reads 0 B, changes by bitmap"} {
		if !strings.Contains(out, want) {
			t.Errorf("%s is missing:\n%s", want, out)
		}
	}
	var res groupResult
	if err := json.Unmarshal([]byte(mustRun(t, env, "backup", "-o", "json", uri, "--volume", "shop/vm", "--scratch", dir).stdout), &res); err != nil {
		t.Fatal(err)
	}
	for _, p := range res.Points {
		if p.Kind != "incremental" || p.Source != "bitmap" || p.Stats.Changed > 256<<10 {
			t.Errorf("%s: %+v", p.Name, p)
		}
	}
	back := filepath.Join(dir, "back")
	mustRun(t, env, "restore", "--group", "shop/vm@latest", back)
	for _, name := range []string{"vda", "vdb"} {
		want, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(back, "vm-"+name+".img")); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s differs, or cannot be read: %v", name, err)
		}
	}
	if out := mustRun(t, env, "show", "shop/vm-vda@latest").stdout; !strings.Contains(out, "crash-consistent") {
		t.Errorf("the point:\n%s", out)
	}
	if out := mustRun(t, env, "source", "forget", uri, "--volume", "shop/vm").stdout; strings.Count(out, "removed vd") != 2 {
		t.Errorf("forgotten:\n%s", out)
	}
	// The next one says why it reads all.
	out = mustRun(t, env, "backup", uri, "--volume", "shop/vm", "--scratch", dir, "--exclude", "vdb").stdout
	if !strings.Contains(out, "changed blocks from allocation instead of bitmap: FailedPrecondition: bitmap: changed blocks are not available: the disk's top image has no bitmap") || strings.Contains(out, "vm-vdb") {
		t.Errorf("without its bitmap:\n%s", out)
	}
	for args, code := range map[string]int{
		uri + " --include vdx":               exitNotFound,
		uri + " --raw":                       exitUsage,
		uri + " --parent shop/vm-vda@latest": exitUsage,
		uri + " --freeze":                    exitUsage,
		uri + "?agent=rel":                   exitUsage,
		"qemu+qmp://" + dir + "/none":        exitFailure,
	} {
		if r := runVarve(t, env, append([]string{"backup", "--volume", "shop/vm"}, strings.Fields(args)...)...); r.code != code {
			t.Errorf("%s: exit code %d instead of %d\n%s", args, r.code, code, r.stderr)
		}
	}
}

// overwrite writes to a place of a file.
func overwrite(t *testing.T, path string, b []byte, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

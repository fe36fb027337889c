package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// newKernelVolume backs the disk up under a separate name, since loop devices belong to the
// whole machine, and returns what counts those over it.
func newKernelVolume(t *testing.T, env testEnv) (volume string, loops func() int) {
	t.Helper()
	volume = fmt.Sprintf("shop/kernel-%d-%s", os.Getpid(), strings.ToLower(t.Name()))
	mustRun(t, env, "backup", filepath.Join(env["HOME"], "disk.img"), "--volume", volume)
	return volume, func() (n int) {
		files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), "/"+volume+"/") {
				n++
			}
		}
		return n
	}
}

func TestKernelMountSurvivesNothing(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedRoot(t)
	env := newFilesEnv(t)
	program := buildVarve(t)
	dir := t.TempDir()
	conf := filepath.Join(dir, "etc/app.conf")
	volume, loops := newKernelVolume(t, env)
	cmd := start(t, env, program, "mount", "--kernel", "--loop", volume+"@latest", dir)
	waitUntil(t, "the file system appears", func() bool { _, err := os.Stat(conf); return err == nil })
	if b, err := os.ReadFile(conf); err != nil || string(b) != "port=1\n" {
		t.Errorf("the file holds %q, %v", b, err)
	}
	if loops() != 1 {
		t.Errorf("there are %d loop devices", loops())
	}
	if out, err := exec.Command(program, "umount", filepath.Dir(conf)).CombinedOutput(); err == nil {
		t.Errorf("a directory below was unmounted: %s", out)
	}
	second := start(t, env, program, "mount", "--kernel", "--loop", volume+"@latest", dir)
	if err := second.Wait(); err == nil {
		t.Error("the directory could be mounted on twice")
	}
	if b, err := os.ReadFile(conf); err != nil || string(b) != "port=1\n" {
		t.Errorf("after another mount was refused the file holds %q, %v", b, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	waitUntil(t, "the killed process's mount goes", func() bool { return isEmpty(dir) && loops() == 0 && !fusefs.IsKernelMount(dir) })

	cmd = start(t, env, program, "mount", "--kernel", "--loop", volume+"@latest", dir)
	waitUntil(t, "the file system appears", func() bool { _, err := os.Stat(conf); return err == nil })
	mustRun(t, env, "umount", dir)
	if err := cmd.Wait(); err != nil {
		t.Errorf("after umount: %v", err)
	}
	waitUntil(t, "the loop device goes", func() bool { return isEmpty(dir) && loops() == 0 })
}

// A partition is mounted at its offset on the disk, and a signal ends the mount while files
// are open.
func TestKernelMountOfAPartition(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "sfdisk")
	env := newFilesEnv(t)
	program := buildVarve(t)
	image := filepath.Join(env["HOME"], "disk.img")
	diskfstest.Run(t, "sh", "-ec", `mv "$1" "$1.part"; truncate -s 40M "$1"
printf 'label: gpt\nstart=2MiB,size=16MiB\nsize=8MiB\n' | sfdisk -q "$1"
dd if="$1.part" of="$1" bs=1M seek=2 conv=notrunc status=none`, "sh", image)
	volume, loops := newKernelVolume(t, env)
	dir := t.TempDir()
	for _, c := range []struct{ partition, want string }{{"", "--partition"}, {"p3", "there are p1 (ext4), p2 (unknown)"}, {"p2", "mount"}} {
		if r := runVarve(t, env, "mount", "--kernel", "--loop", volume+"@latest", dir, "--partition="+c.partition); r.code == exitOK || !strings.Contains(r.stderr, c.want) {
			t.Errorf("partition %q: exit code %d\n%s", c.partition, r.code, r.stderr)
		}
	}
	cmd := start(t, env, program, "mount", "--kernel", "--loop", volume+"@latest", "--partition", "p1", dir)
	conf := filepath.Join(dir, "etc/app.conf")
	waitUntil(t, "the file system appears", func() bool { _, err := os.Stat(conf); return err == nil })
	f, err := os.Open(conf)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 7)
	if _, err := f.Read(b); err != nil || string(b) != "port=1\n" {
		t.Errorf("the file holds %q, %v", b, err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "the directory is empty", func() bool { return isEmpty(dir) })
	if err := errors.Join(f.Close(), cmd.Wait()); err != nil {
		t.Errorf("after a signal: %v", err)
	}
	waitUntil(t, "the loop device goes", func() bool { return loops() == 0 && !fusefs.IsKernelMount(dir) })
}

// If both the process and its watch are killed, the next 'varve umount' or 'varve mount
// --kernel' on the directory cleans up.
func TestKernelMountIsCleanedUpLater(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedRoot(t)
	env := newFilesEnv(t)
	program := buildVarve(t)
	dir := t.TempDir()
	conf := filepath.Join(dir, "etc/app.conf")
	volume, loops := newKernelVolume(t, env)
	t.Cleanup(func() { _ = fusefs.UnmountKernel(dir, true, nil) })
	crash := func() {
		t.Helper()
		cmd := start(t, env, program, "mount", "--kernel", "--loop", volume+"@latest", dir)
		waitUntil(t, "the file system appears", func() bool { _, err := os.Stat(conf); return err == nil })
		waitUntil(t, "the process that mounted ends", func() bool { return len(children(t, cmd.Process.Pid)) == 2 })
		killed := 0
		for _, pid := range children(t, cmd.Process.Pid) { // the watch, and what unmounts the tree
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			killed++
		}
		if err := cmd.Process.Kill(); err != nil || killed != 2 {
			t.Fatalf("%d other processes, %v", killed, err)
		}
		_ = cmd.Wait()
		if isEmpty(dir) || loops() != 1 || !fusefs.IsKernelMount(dir) {
			t.Fatalf("somebody cleaned up: the test proves nothing; %d loop devices", loops())
		}
	}

	crash()
	mustRun(t, env, "umount", dir)
	waitUntil(t, "umount cleans up", func() bool { return isEmpty(dir) && loops() == 0 && !fusefs.IsKernelMount(dir) })
	crash()
	// In the background, since the old mount may still show what is in the page cache.
	if err := start(t, env, program, "mount", "--kernel", "--loop", volume+"@latest", dir, "--daemon").Wait(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(conf); err != nil || string(b) != "port=1\n" {
		t.Errorf("the file holds %q, %v", b, err)
	}
	waitUntil(t, "the old device goes", func() bool { return loops() == 1 })
	mustRun(t, env, "umount", dir)
	waitUntil(t, "the loop device goes", func() bool { return isEmpty(dir) && loops() == 0 })
}

// children lists the child processes of a process.
func children(t *testing.T, pid int) (list []int) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // the thread may have ended
			t.Fatal(err)
		}
		for _, f := range strings.Fields(string(b)) {
			child, err := strconv.Atoi(f)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, child)
		}
	}
	return list
}

// A loop device of another program is not touched, whatever its file is called and wherever
// it is mounted.
func TestKernelMountLeavesOtherLoopDevices(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedRoot(t)
	env := newFilesEnv(t)
	program := buildVarve(t)
	volume, loops := newKernelVolume(t, env)
	image := filepath.Join(env["HOME"], "disk.img") // the name that Varve uses
	other, _ := diskfstest.Mount(t, image, "")
	mark := filepath.Join(other, "mine")
	if err := os.WriteFile(mark, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	check := func(when string) {
		t.Helper()
		if b, err := os.ReadFile(mark); err != nil || string(b) != "mine" {
			t.Errorf("%s the other mount holds %q, %v", when, b, err)
		}
	}
	for _, lazy := range []string{"--lazy=false", "--lazy"} {
		if r := runVarve(t, env, "umount", lazy, other); r.code != exitUsage {
			t.Errorf("umount %s of another's mount: exit code %d\n%s", lazy, r.code, r.stderr)
		}
		check("after umount")
	}
	// Varve's mount on top of it, killed, cleaned up, and unmounted.
	cmd := start(t, env, program, "mount", "--kernel", "--loop", volume+"@latest", other)
	waitUntil(t, "ours lies on top", func() bool { return fusefs.IsKernelMount(other) && loops() == 1 && !exists(mark) })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	waitUntil(t, "the watch cleans up", func() bool { return loops() == 0 && !fusefs.IsKernelMount(other) })
	check("after a kill")
	if err := fusefs.CleanKernel(other, nil); err != nil {
		t.Error(err)
	}
	check("after cleaning up")
	out := diskfstest.Run(t, "findmnt", "-n", "-o", "SOURCE", "--mountpoint", other)
	if lines := strings.Fields(out); len(lines) != 1 || !strings.HasPrefix(lines[0], "/dev/loop") {
		t.Errorf("on the directory are mounted %q", lines)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// startNBD runs an NBD server until stop, on a socket unless args say otherwise, and returns the
// socket's URI.
func startNBD(t *testing.T, name string, args ...string) (uri string, stop func()) {
	t.Helper()
	diskfstest.NeedTool(t, name)
	dir := t.TempDir()
	sock, pid := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	flags := []string{"--pid-file", pid}
	if name == "qemu-nbd" && !slices.Contains(args, "-p") && !slices.Contains(args, "-k") {
		flags = append(flags, "-k", sock)
	}
	if name == "nbdkit" {
		flags = []string{"-P", pid, "-U", sock}
	}
	cmd := exec.Command(name, append(flags, args...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	stop = func() {
		if !ended {
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait()
		}
		ended = true
	}
	t.Cleanup(stop)
	waitUntil(t, name+" serves", func() bool { _, err := os.Stat(pid); return err == nil })
	return "nbd+unix:///disk?socket=" + sock, stop
}

// TestRestoreToNBD restores to a qcow2 that a qemu-nbd of others serves, and to an nbdkit that
// logs what it is asked.
func TestRestoreToNBD(t *testing.T) {
	env, _ := newBackupEnv(t)
	dir := env["HOME"]
	vm, to := filepath.Join(dir, "vm.qcow2"), filepath.Join(dir, "to.qcow2")
	qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", vm, "32M")
	qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 8M", "-c", "write -P 2 20M 1M", vm)
	mustRun(t, env, "backup", vm, "--volume", "shop/vm")
	qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", to, "32M")
	qemuTool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 6M 4M", "-c", "write -P 7 24M 64k", to)

	uri, stop := startNBD(t, "qemu-nbd", "-t", "-e", "8", "-f", "qcow2", "--discard=unmap", "-x", "disk", to)
	out := mustRun(t, env, "restore", "shop/vm@latest", uri, "--overwrite", "--verify").stdout
	if !strings.Contains(out, "verified") {
		t.Errorf("the restore:\n%s", out)
	}
	stop()
	qemuTool(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", to, vm)
	if r := runVarve(t, env, "restore", "shop/vm@latest", uri, "--overwrite"); r.code == exitOK {
		t.Error("restored to a server that is gone")
	}

	log := filepath.Join(dir, "log")
	uri, stop = startNBD(t, "nbdkit", "-f", "--filter=log", "memory", "32M", "logfile="+log)
	mustRun(t, env, "restore", "shop/vm@latest", uri)
	stop()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for request, want := range map[string]bool{"Write": true, "Trim": false, "Flush": true, "Connect": true} {
		if got := regexp.MustCompile(` ` + request + ` `).Match(text); got != want {
			t.Errorf("nbdkit was asked for %s: %v", request, got)
		}
	}
	last := regexp.MustCompile(` (Write|Zero|Flush) id=`).FindAllStringSubmatch(string(text), -1)
	if len(last) == 0 || last[len(last)-1][1] != "Flush" {
		t.Errorf("the last request is no Flush:\n%.2000s", text)
	}
}

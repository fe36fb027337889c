package libvirt

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestListenScript: whatever ends the script, in each shell, it leaves neither the program nor its folder.
func TestListenScript(t *testing.T) {
	t.Parallel()
	diskfstest.NeedTool(t, "qemu-nbd")
	// A shell does not trap a signal that was ignored when it began, as under nohup: what is caught here is not.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(caught) })
	for name, shell := range map[string][]string{"dash": {"dash"}, "busybox": {"busybox", "sh"}, "bash": {"bash", "--posix"}} {
		diskfstest.NeedTool(t, shell[0])
		for _, end := range []string{"input", "silence", "reader", "killed", "program", "refused"} {
			t.Run(name+" "+end, func(t *testing.T) {
				t.Parallel()
				parent, err := os.MkdirTemp("/tmp", "listen-") // short, as a socket's path must be
				if err != nil {
					t.Fatal(err)
				}
				defer os.RemoveAll(parent)
				dir, image := filepath.Join(parent, "d"), filepath.Join(parent, "it's a disk")
				if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
					t.Fatal(err)
				}
				argv := []string{"qemu-nbd", "-t", "-r", "-f", "raw", "-k", dir + "/s", "--", image}
				if end == "program" {
					argv[5] = "qcow2"
				}
				seconds := 600
				if end == "silence" {
					seconds = 1
				}
				cmd := exec.Command(shell[0], append(shell[1:], "-c", fmt.Sprintf(listenScript, dir, quote(parent), quoteAll(argv), seconds))...)
				cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: end != "refused"}
				in, err := cmd.StdinPipe()
				if err != nil {
					t.Fatal(err)
				}
				defer in.Close()
				var said strings.Builder
				cmd.Stderr = &said
				ready := &readyFeed{ready: make(chan struct{})}
				cmd.Stdout = ready
				if end == "reader" {
					r, w, err := os.Pipe()
					if err != nil {
						t.Fatal(err)
					}
					_ = r.Close()
					defer w.Close()
					cmd.Stdout = w
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				switch end {
				case "input", "killed":
					<-ready.ready
					if servers(image) == 0 {
						t.Error("its program is not found")
					}
					if end == "input" {
						_ = in.Close()
					} else {
						_ = cmd.Process.Signal(syscall.SIGHUP)
					}
				}
				_ = cmd.Wait() // it kills itself too
				if want := map[string]string{"program": "qemu-nbd", "refused": "process group"}[end]; !strings.Contains(said.String(), want) {
					t.Errorf("it says %q", &said)
				}
				for end := time.Now().Add(5 * time.Minute); servers(image) > 0; time.Sleep(10 * time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("its program is left")
					}
				}
				if _, err := os.Lstat(dir); err == nil {
					t.Error("its folder is left")
				}
			})
		}
	}
}

// servers counts the processes that have an image in their command line, but for shells.
func servers(image string) (n int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), "qemu-nbd\x00") && strings.Contains(string(b), image) {
			n++
		}
	}
	return n
}

// TestListenerEndsSlowly: the image of a listener is free when it is closed, though its host takes some seconds.
func TestListenerEndsSlowly(t *testing.T) {
	dir := t.TempDir()
	ssh := filepath.Join(dir, "ssh")
	if err := os.WriteFile(ssh, []byte("#!/bin/sh\necho ready\ncat >/dev/null\nsleep 3\n: >\"$0.ended\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	l, err := (&URI{Transport: "ssh", Host: "slow"}).Listen(t.Context(), "/", func(string) []string { return []string{"qemu-nbd"} })
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(ssh + ".ended"); err != nil {
		t.Errorf("it was not waited for: %v", err)
	}
}

package disk

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestQEMULocks opens a raw file while QEMU writes to it, reads it, or has closed it, and
// lets QEMU open it while it is read.
func TestQEMULocks(t *testing.T) {
	diskfstest.NeedTool(t, "qemu-io")
	path := tempFile(t, random(1<<20, 1))
	open := func(args ...string) (release func()) {
		t.Helper()
		cmd := exec.Command("qemu-io", append(args, "-f", "raw", path)...)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// It answers once the image is open.
		if _, err := stdin.Write([]byte("length\n")); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 64)
		if n, err := stdout.Read(b); err != nil {
			t.Fatalf("%s %v", b[:n], err)
		}
		return func() {
			_ = stdin.Close()
			_ = cmd.Wait()
		}
	}

	release := open()
	_, err := Open(path, Options{})
	if !errors.Is(err, ErrMounted) || !strings.Contains(err.Error(), "in QEMU") || !strings.Contains(err.Error(), "nbd://") {
		t.Errorf("a source that QEMU writes to: %v", err)
	}
	s, err := Open(path, Options{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	if s.InUse() == "" {
		t.Error("a source that QEMU writes to is not live")
	}
	_ = s.Close()
	if _, err := OpenTarget(path, TargetOptions{Size: 1 << 20, Keep: true}); !errors.Is(err, ErrMounted) {
		t.Errorf("a target that QEMU writes to: %v", err)
	}
	release()

	release = open("-r")
	if s, err = Open(path, Options{}); err != nil {
		t.Errorf("a source that QEMU reads: %v", err)
	} else {
		_ = s.Close()
	}
	if _, err := OpenTarget(path, TargetOptions{Size: 1 << 20, Keep: true}); !errors.Is(err, ErrMounted) {
		t.Errorf("a target that QEMU reads: %v", err)
	}
	release()

	if s, err = Open(path, Options{}); err != nil {
		t.Fatal(err)
	}
	write := func() error { return exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", path).Run() }
	if write() == nil {
		t.Error("QEMU may write while a backup reads")
	}
	_ = s.Close()
	if err := write(); err != nil {
		t.Errorf("QEMU may not write after a backup: %v", err)
	}
}

//go:build linux

package mounttest

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A mount that somebody lets go of a moment later is unmounted.
func TestUnmountBusy(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("a mount needs root: %v", err)
	}
	f, err := os.Create(filepath.Join(dir, "held"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(dir, 0); err != unix.EBUSY {
		t.Fatalf("a mount with an open file: %v, want EBUSY", err)
	}
	go func() {
		time.Sleep(50 * time.Millisecond)
		f.Close()
	}()
	Unmount(t, dir)
	if _, err := os.Stat(filepath.Join(dir, "held")); !os.IsNotExist(err) {
		t.Errorf("the mount is still there: %v", err)
	}
}

//go:build linux

// Package mounttest unmounts what tests mounted.
package mounttest

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Unmount unmounts a directory; the test fails where it cannot. A process that another
// goroutine is starting holds a copy of every open file until it runs its program, so a mount that
// is busy gets minutes.
func Unmount(t testing.TB, dir string) {
	t.Helper()
	end := time.Now().Add(10 * time.Minute)
	err := unix.Unmount(dir, 0)
	for errors.Is(err, unix.EBUSY) && time.Now().Before(end) {
		time.Sleep(10 * time.Millisecond)
		err = unix.Unmount(dir, 0)
	}
	if err != nil {
		t.Errorf("unmount %s: %v", dir, err)
	}
}

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"testing"

	kopia "github.com/pkg/errors"

	"github.com/varve-io/varve/backup"
)

// TestBrief: an error of storage is one short line, however many layers of Kopia it came
// through, and it is still the error that it was.
func TestBrief(t *testing.T) {
	system := &fs.PathError{Op: "mkdir", Path: "/r/s", Err: syscall.EROFS}
	marker := kopia.Wrap(kopia.Wrap(system, "unable to write session marker"), "unable to complete PutBlob despite 2 retries")
	for _, c := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("flush to storage: %w", kopia.Wrap(marker, "write manifests")), "flush to storage: mkdir /r/s: read-only file system"},
		{fmt.Errorf("write: %w", fmt.Errorf("write: %w", marker)), "write: mkdir /r/s: read-only file system"},
		{errors.Join(fmt.Errorf("first: %w", marker), errors.New("second")), "first: mkdir /r/s: read-only file system; second"},
		{kopia.New("only a text"), "only a text"},
		{fmt.Errorf("a: %w: %w", errors.New("b"), marker), "a: b: mkdir /r/s: read-only file system"},
		{marker, "mkdir /r/s: read-only file system"},
	} {
		if got := message(c.err); got != c.want {
			t.Errorf("%v\nis %q, want %q", c.err, got, c.want)
		}
		if hint(c.err) == "" && errors.Is(c.err, syscall.EROFS) && strings.HasSuffix(c.err.Error(), syscall.EROFS.Error()) {
			t.Errorf("%q has no hint", c.want)
		}
	}
	if got := message(fmt.Errorf("%w: %q may be:\n  a\x1b[1m\n  b", backup.ErrAmbiguous, "x")); strings.Count(got, "\n") != 2 || strings.Contains(got, "\x1b") {
		t.Errorf("ambiguous: %q", got)
	}
}

func TestWhatStays(t *testing.T) {
	root := newRootCommand(newApp())
	for path := range interruptedText {
		cmd, _, err := root.Find(strings.Fields(path)[1:])
		if err != nil || cmd.CommandPath() != path {
			t.Errorf("%q is no command: %v", path, err)
		}
	}
	if got := whatStays("varve backup", exitInterrupted, "interrupted"); !strings.HasPrefix(got, "interrupted; older recovery points are as they were") {
		t.Error(got)
	}
	if got := whatStays("varve list", exitInterrupted, "interrupted"); got != "interrupted" {
		t.Error(got)
	}
}

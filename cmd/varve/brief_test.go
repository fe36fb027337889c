package main

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"testing"

	kopia "github.com/pkg/errors"

	"github.com/varve-io/varve/backup/points"
)

// TestBrief: an error of storage is one short line, through however many layers of Kopia, and
// still the same error.
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
	if got := message(fmt.Errorf("%w: %q may be:\n  a\x1b[1m\n  b", points.ErrAmbiguous, "x")); strings.Count(got, "\n") != 2 || strings.Contains(got, "\x1b") {
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
	if got := whatStays("varve backup", exitInterrupted, false, "interrupted"); !strings.HasPrefix(got, "interrupted; older recovery points are unchanged") {
		t.Error(got)
	}
	if got := whatStays("varve backup", exitFailure, true, "failed"); !strings.Contains(got, "continue from the last checkpoint") {
		t.Error(got)
	}
	// Nothing was read: there is nothing to continue.
	env, _ := newBackupEnv(t)
	if r := runVarve(t, env, "backup", "nosuch.img", "--volume", "shop/db"); r.code != exitFailure || !strings.Contains(r.stderr, "nosuch.img") || strings.Contains(r.stderr, "checkpoint") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if got := whatStays("varve list", exitInterrupted, false, "interrupted"); got != "interrupted" {
		t.Error(got)
	}
}

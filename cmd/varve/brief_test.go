package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
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
	const backup = "; older recovery points are unchanged; run it again to continue from the last checkpoint"
	for _, c := range []struct {
		command    string
		work       workState
		left       string
		code       int
		text, want string // want follows text
	}{
		{"varve backup", workNotBegun, "", exitInterrupted, "interrupted", backup},
		{"varve backup", workNotBegun, "", exitFailure, "failed", ""},
		{"varve backup", workBegun, "", exitFailure, "failed", backup},
		{"varve backup", workBegun, "", exitRepository, "unreachable", backup},
		{"varve backup", workBegun, "", exitDamaged, "lost", "; older recovery points are unchanged"},
		{"varve backup", workBegun, "", exitRefused, "another disk", ""},
		{"varve backup", workBegun, "", exitFailure, "the group is incomplete: 1 of its 2 points were made", ""},
		{"varve backup", workDone, "recovery point x was made", exitInterrupted, "interrupted", "; recovery point x was made"},
		{"varve backup", workDone, "recovery point x was made", exitRefused, "busy", "; recovery point x was made"},
		{"varve restore", workNotBegun, "", exitInterrupted, "interrupted", "; nothing was written by this run; run it again"},
		{"varve restore", workBegun, "incomplete; again", exitInterrupted, "interrupted", "; incomplete; again"},
		{"varve restore", workBegun, "incomplete; again", exitDamaged, "lost", "; incomplete"},
		{"varve restore", workBegun, "again", exitFailure, "write x: full; it is incomplete: free some space", ""},
		{"varve repo create s3", workNotBegun, "", exitInterrupted, "interrupted", "; run it again with the same options and password"},
		{"varve list", workNotBegun, "", exitInterrupted, "interrupted", ""},
	} {
		a := &app{work: c.work, left: c.left}
		if got := a.whatStays(c.command, c.code, c.text); got != c.text+c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
	// Nothing was read: there is nothing to continue.
	env, _ := newBackupEnv(t)
	if r := runVarve(t, env, "backup", "nosuch.img", "--volume", "shop/db"); r.code != exitFailure || !strings.Contains(r.stderr, "nosuch.img") || strings.Contains(r.stderr, "checkpoint") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
}

// TestErrorsThatNameThePoint: nothing is added to errors of a backup whose point is there.
func TestErrorsThatNameThePoint(t *testing.T) {
	source, err := os.ReadFile("../../backup/finish.go")
	if err != nil {
		t.Fatal(err)
	}
	texts := regexp.MustCompile(`"(recovery point %s (?:is|was) [^"]*)"`).FindAllStringSubmatch(string(source), -1)
	if len(texts) != 4 {
		t.Errorf("backup/finish.go has %d errors that name a point", len(texts))
	}
	for _, m := range texts {
		text := strings.Replace(m[1], "%s", strings.Repeat("0123456789abcdef", 2), 1)
		if got := (&app{work: workBegun}).whatStays("varve backup", exitRepository, text); got != text {
			t.Error(got)
		}
	}
}

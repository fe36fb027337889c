package overlay

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// abandon makes a scratch directory as left by a killed process: without a lock.
func abandon(t *testing.T, parent string) string {
	t.Helper()
	s, err := NewScratch(parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(filepath.Join(s.Dir, "point"), 0o700), os.WriteFile(filepath.Join(s.Dir, "point", "data"), []byte("x"), 0o600),
		s.lock.Close()); err != nil {
		t.Fatal(err)
	}
	return s.Dir
}

// Only what a process of Varve made and left is deleted, whatever the name and the age.
func TestSweep(t *testing.T) {
	parent := filepath.Join(t.TempDir(), "[odd]*") // must not be a pattern
	if err := os.Mkdir(parent, 0o700); err != nil {
		t.Fatal(err)
	}
	var stay []string
	named := func(name, mark string) string {
		dir := filepath.Join(parent, scratchPrefix+name)
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "point"), 0o700), os.WriteFile(filepath.Join(dir, "point", "data"), []byte("x"), 0o600)); err != nil {
			t.Fatal(err)
		}
		if mark != "" {
			if err := os.WriteFile(filepath.Join(dir, scratchMark), []byte(mark), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		stay = append(stay, filepath.Join(dir, "point", "data"))
		return dir
	}
	named("mydb", "")
	named("empty-mark", " ")
	named("copied", markText(scratchPrefix+"original"))
	named("longer", markText(scratchPrefix+"longer")+"more")
	linked := named("linked-mark", "")
	elsewhere := filepath.Join(t.TempDir(), "mark")
	if err := errors.Join(os.WriteFile(elsewhere, []byte(markText(filepath.Base(linked))), 0o600), os.Symlink(elsewhere, filepath.Join(linked, scratchMark))); err != nil {
		t.Fatal(err)
	}
	// A link to a directory that has a mark for the name of the link.
	target := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(target, scratchMark), []byte(markText(scratchPrefix+"link")), 0o600), os.WriteFile(filepath.Join(target, "data"), nil, 0o600),
		os.Symlink(target, filepath.Join(parent, scratchPrefix+"link"))); err != nil {
		t.Fatal(err)
	}
	stay = append(stay, filepath.Join(target, "data"))
	taken := abandon(t, parent)
	user, err := TakeDir(taken)
	if err != nil {
		t.Fatal(err)
	}
	if err := user.Close(); err != nil { // it is kept for the user
		t.Fatal(err)
	}
	stay = append(stay, filepath.Join(taken, "point", "data"))
	held := abandon(t, parent)
	reader, err := HoldDir(held)
	if err != nil {
		t.Fatal(err)
	}
	used, err := NewScratch(parent)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := TakeDir(used.Dir); !errors.Is(err, ErrInUse) {
		t.Errorf("the scratch directory of a running process was taken over: %v", err)
	}
	left := abandon(t, parent)
	s, err := NewScratch(parent)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(stay, held, used.Dir, s.Dir) {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what a killed process left is there still: %v", err)
	}
	if err := errors.Join(used.Close(), s.Close(), reader.Close()); err != nil {
		t.Fatal(err)
	}
	last, err := NewScratch(parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := last.Close(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{used.Dir, s.Dir, held, last.Dir} {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is there still: %v", dir, err)
		}
	}
}

// A server without --keep removes its own overlays, never those that another kept.
func TestKeptIsNotRemoved(t *testing.T) {
	base := newBase(1 << 20)
	dir := filepath.Join(t.TempDir(), "overlay")
	o := open(t, base, Options{Dir: dir, BaseID: "a", Keep: true})
	if _, err := o.WriteAt(t.Context(), []byte("kept"), 0); err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if other, err := Open(base, Options{Dir: dir, BaseID: "a"}); !errors.Is(err, ErrKept) {
		t.Errorf("a kept overlay was opened to be removed: %v", errors.Join(err, other.Close()))
	}
	if got := content(t, open(t, base, Options{Dir: dir, BaseID: "a", Keep: true})); string(got[:4]) != "kept" {
		t.Errorf("it reads %q", got[:4])
	}
}

// Overlays grow as large as disks: they are not in memory unless the user says so.
func TestScratchParent(t *testing.T) {
	t.Setenv("TMPDIR", "")
	if _, err := os.Stat(largeTemporary); err == nil && ScratchParent() != largeTemporary {
		t.Errorf("scratch directories lie in %s", ScratchParent())
	}
	t.Setenv("TMPDIR", "/elsewhere")
	if dir := ScratchParent(); dir != "/elsewhere" {
		t.Errorf("with $TMPDIR they lie in %s", dir)
	}
}

package overlay

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// What a killed process left goes, what is in use or just being made stays.
func TestScratchOfAKilledProcess(t *testing.T) {
	parent := t.TempDir()
	old := time.Now().Add(-time.Hour)
	make := func(name string, age time.Time) string {
		dir := filepath.Join(parent, name)
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "point"), 0o700), os.WriteFile(filepath.Join(dir, "point", "data"), []byte("x"), 0o600),
			os.Chtimes(dir, age, age)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	left := make(scratchPrefix+"left", old)
	young := make(scratchPrefix+"young", time.Now())
	other := make("other", old)
	used, err := NewScratch(parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(used.Dir, old, old); err != nil {
		t.Fatal(err)
	}
	s, err := NewScratch(parent)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what a killed process left is there still: %v", err)
	}
	for _, dir := range []string{young, other, used.Dir, s.Dir} {
		if _, err := os.Stat(dir); err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(used.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{used.Dir, s.Dir} {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a closed one is there still: %v", err)
		}
	}
}

// Overlays grow as large as disks: they do not lie in memory unless the user says so.
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

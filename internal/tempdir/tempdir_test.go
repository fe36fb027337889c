package tempdir

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// TestMake removes what was left, and nothing that is in use or another's.
func TestMake(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	left, other, open := filepath.Join(parent, "varve-x-left"), filepath.Join(parent, "other-1"), filepath.Join(parent, "varve-x-open")
	for _, dir := range []string{left, other, open} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(left, "nbd"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o755); err != nil { // none that Make made
		t.Fatal(err)
	}
	a, err := Make(parent, "varve-x-")
	if err != nil {
		t.Fatal(err)
	}
	b, err := Make(parent, "varve-x-")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(left); err == nil {
		t.Error("what a process left is still there")
	}
	for _, dir := range []string{a.Path(), b.Path(), other, open} {
		if _, err := os.Lstat(dir); err != nil {
			t.Errorf("it was removed: %v", err)
		}
	}
	for range 2 {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(a.Path()); err == nil {
		t.Error("a closed one is there")
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// TestMakeAtOnce has many at once: each has a directory of its own until it closes it.
func TestMakeAtOnce(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			d, err := Make(parent, "varve-x-")
			if err != nil {
				t.Error(err)
				return
			}
			if err := os.WriteFile(filepath.Join(d.Path(), "nbd"), nil, 0o600); err != nil {
				t.Error(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if list, err := os.ReadDir(parent); err != nil || len(list) > 0 {
		t.Errorf("left: %v, %v", list, err)
	}
}

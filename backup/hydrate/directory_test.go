package hydrate

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestStrangersDirectory gives the cache directories with other content. A directory with
// "data" in it was once taken for an unwanted copy.
func TestStrangersDirectory(t *testing.T) {
	for name, files := range map[string][]string{
		"a database":      {"postgres/data/base"},
		"another program": {"app/data"},
		"kept overlays":   {"3415afa916a7719a2ac2afb31ba6698a/data", "3415afa916a7719a2ac2afb31ba6698a/map"},
		"its lock":        {"lock", "app/data"},
		"a file":          {"notes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, f := range files {
				path := filepath.Join(dir, f)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("precious"), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			c, err := New(Options{Dir: dir})
			if !errors.Is(err, ErrNotACache) {
				t.Errorf("opened: %v", err)
			}
			if err == nil {
				c.Retain(func(string) bool { return false })
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}
			for _, f := range files {
				if b, err := os.ReadFile(filepath.Join(dir, f)); err != nil || string(b) != "precious" {
					t.Errorf("%s: %q, %v", f, b, err)
				}
			}
		})
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "lost+found"), 0o700); err != nil { // a separate disk
		t.Fatal(err)
	}
	c, err := New(Options{Dir: dir, Keep: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "later", "data"), 0o700), os.Mkdir(filepath.Join(dir, "overlay"), 0o700), c.Close()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"data", "map"} {
		if err := os.WriteFile(filepath.Join(dir, "overlay", name), []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if c, err = New(Options{Dir: dir}); err != nil { // its own, with other content added since
		t.Fatal(err)
	}
	c.Retain(func(string) bool { return false })
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for _, path := range []string{"later/data", "overlay/data", "overlay/map"} {
		if _, err := os.Stat(filepath.Join(dir, path)); err != nil {
			t.Error(err)
		}
	}
}

// A copy belongs to one image of one size and unit.
func TestBoundToImage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	a := newImage(10 * unit)
	c, _ := openCache(t, Options{Dir: dir, Keep: true})
	d := c.mustOpen(t, a, "a")
	same(t, d, a.data)
	if _, err := c.Open(a, "a", unit); !errors.Is(err, ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	if _, err := New(Options{Dir: dir}); !errors.Is(err, ErrInUse) {
		t.Errorf("two caches in a directory: %v", err)
	}
	closed(t, d)
	for _, id := range []string{"", "..", "lock", strings.Repeat("x", 300)} {
		if _, err := c.Open(a, id, unit); err == nil {
			t.Errorf("identity %q is accepted", id)
		}
	}
	for _, n := range []int64{-1, 100, 3 * unit, 1 << 40} {
		if _, err := c.Open(a, "b", n); err == nil {
			t.Errorf("a unit of %d is accepted", n)
		}
	}
	// The same name, as after a size or a unit changed; or a stranger's files.
	longer := newImage(11 * unit)
	d = c.mustOpen(t, longer, "a")
	if d.Known() != 0 {
		t.Error("the copy of a shorter image is used")
	}
	same(t, d, longer.data)
	closed(t, d)
	if d, _ = c.Open(longer, "a", 2*unit); d.Known() != 0 {
		t.Error("the copy in other units is used")
	}
	closed(t, d)
	if err := os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, "b%2Fc")); err != nil {
		t.Fatal(err)
	}
	d = c.mustOpen(t, a, "b/c")
	if d.Known() != 0 {
		t.Error("the copy of another image is used")
	}
	same(t, d, a.data)
	closed(t, d)
}

// TestLinkLeadsOut: a link in the cache's directory that leads out of it is not followed.
func TestLinkLeadsOut(t *testing.T) {
	dir, victim := t.TempDir(), t.TempDir()
	c, _ := openCache(t, Options{Dir: dir})
	if err := os.Symlink(victim, filepath.Join(dir, "image")); err != nil {
		t.Fatal(err)
	}
	if d, err := c.Open(newImage(1<<20), "image", 0); err == nil {
		closed(t, d)
		t.Error("the copy is opened")
	}
	if entries, err := os.ReadDir(victim); err != nil || len(entries) > 0 {
		t.Errorf("in the directory outside: %v, %v", entries, err)
	}
}

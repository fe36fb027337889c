package serve

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/nbdserver"
)

// A client that only asks leaves nothing behind; a client that stays gets an overlay and a
// copy, and what it writes is kept there.
func TestOverlaysOfThoseWhoStay(t *testing.T) {
	r := repotest.New(t).Open(t)
	data := text(70_000, 1)
	p := save(t, r, "c", "shop/db", data)
	overlays, dir := filepath.Join(t.TempDir(), "overlays"), filepath.Join(t.TempDir(), "copies")
	copies, err := hydrate.New(hydrate.Options{Dir: dir, Keep: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = copies.Close() })
	c := openCatalog(t, r, Options{Writable: &Overlays{Dir: overlays, Keep: true}, Hydrate: copies, Pad: 512})
	there := func() (n int) {
		for _, path := range []string{filepath.Join(overlays, p.ID, "map"), filepath.Join(dir, p.ID, "map")} {
			if _, err := os.Stat(path); err == nil {
				n++
			}
		}
		return n
	}
	o := c.mustOpen(t, p.Name())
	w, ok := o.Export.(nbdserver.Writer)
	if _, err := o.Export.(nbdserver.Statuser).Contexts(t.Context()); !ok || err != nil || o.Size() != 70_144 {
		t.Errorf("asked: a writer %v of %d bytes, %v", ok, o.Size(), err)
	}
	if _, n := c.OverlayBytes(); n != 0 || there() != 0 {
		t.Errorf("%d overlays, %d directories after somebody asked", n, there())
	}
	if _, err := w.WriteAt(t.Context(), []byte("x"), 0); err == nil {
		t.Error("written before anybody stays")
	}
	if err := o.Enter(t.Context(), nil); err != nil || there() != 2 {
		t.Fatalf("%d directories after somebody stayed: %v", there(), err)
	}
	if _, err := w.WriteAt(t.Context(), []byte("written"), 5000); err != nil || w.Flush(t.Context()) != nil {
		t.Fatal(err)
	}
	copy(data[5000:], "written")
	o.Close()
	again := c.mustOpen(t, p.Name())
	got := make([]byte, len(data))
	if _, err := again.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("another client reads something else: %v", err)
	}
	if bytes, n := c.OverlayBytes(); n != 1 || bytes != overlay.Granule {
		t.Errorf("%d overlays of %d bytes", n, bytes)
	}
}

// The description of a writable disk names its overlay: after a restart the same one if it
// was kept, else another.
func TestOverlayIsNamed(t *testing.T) {
	r := repotest.New(t).Open(t)
	p := save(t, r, "c", "shop/db", text(70_000, 1))
	enter := func(overlays Overlays) string {
		t.Helper()
		c, err := Open(t.Context(), r, image.NewCache(1<<20), Options{Writable: &overlays})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := c.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}()
		// As servers have it: a name may be an alias.
		o, err := nbdserver.NewAliases(c, time.Minute, nil).Open(t.Context(), "shop/db@latest", nbdserver.Client{})
		if err != nil {
			t.Fatal(err)
		}
		defer o.Close()
		if err := o.Enter(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(o.Description, description(p)+", overlay ") {
			t.Errorf("it is %q", o.Description)
		}
		return o.Description
	}
	kept, scratch := Overlays{Dir: t.TempDir(), Keep: true}, Overlays{Dir: filepath.Join(t.TempDir(), "scratch")}
	if a, b := enter(kept), enter(kept); a != b {
		t.Errorf("a kept overlay is %q and then %q", a, b)
	}
	if a, b := enter(scratch), enter(scratch); a == b {
		t.Errorf("two overlays are both %q", a)
	}
}

// An overlay that only differs by --pad says so; no user is told to remove it.
func TestOverlayOfAnotherPadding(t *testing.T) {
	r := repotest.New(t).Open(t)
	p := save(t, r, "c", "shop/db", text(70_000, 1))
	other := save(t, r, "c", "shop/web", text(80_000, 1))
	enter := func(dir string, pad int64) error {
		t.Helper()
		c, err := Open(t.Context(), r, image.NewCache(1<<20), Options{Writable: &Overlays{Dir: dir, Keep: true}, Pad: pad})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := c.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}()
		o, err := c.Open(t.Context(), p.Name(), nbdserver.Client{})
		if err != nil {
			t.Fatal(err)
		}
		defer o.Close()
		return o.Enter(t.Context(), nil)
	}
	for pad, want := range map[int64]error{512: disks.ErrPadded, 0: disks.ErrNotPadded} {
		dir := t.TempDir()
		if err := enter(dir, pad); err != nil {
			t.Fatal(err)
		}
		if err := enter(dir, 512-pad); !errors.Is(err, want) || errors.Is(err, overlay.ErrOtherBase) {
			t.Errorf("made with --pad %d, opened with %d: %v", pad, 512-pad, err)
		}
		if err := enter(dir, pad); err != nil {
			t.Error(err)
		}
		w, err := KeptOverlay(t.Context(), r, image.NewCache(1<<20), p, filepath.Join(dir, p.ID), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		// The overlay of another disk is still refused as such.
		if err := os.Rename(filepath.Join(dir, p.ID), filepath.Join(dir, other.ID)); err != nil {
			t.Fatal(err)
		}
		if _, err := KeptOverlay(t.Context(), r, image.NewCache(1<<20), other, filepath.Join(dir, other.ID), nil); !errors.Is(err, overlay.ErrOtherBase) {
			t.Errorf("another disk's: %v", err)
		}
	}
}

// A client that cannot get an overlay is refused, and the next one is not affected.
func TestOverlayThatFails(t *testing.T) {
	r := repotest.New(t).Open(t)
	p := save(t, r, "c", "shop/db", text(70_000, 1))
	dir := filepath.Join(t.TempDir(), "overlays")
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := openCatalog(t, r, Options{Writable: &Overlays{Dir: dir, Keep: true}})
	o := c.mustOpen(t, p.Name())
	if err := o.Enter(t.Context(), nil); err == nil {
		t.Error("entered without an overlay")
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := o.Enter(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if held, err := points.Leases(t.Context(), r); err != nil || len(held[p.ID]) != 1 {
		t.Errorf("%d leases, %v", len(held[p.ID]), err)
	}
}

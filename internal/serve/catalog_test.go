package serve

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// memory is a disk to back up.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(m).ReadAt(p, off)
}
func (m memory) Size() int64      { return int64(len(m)) }
func (m memory) CheckSize() error { return nil }

func save(t *testing.T, r *repository.Repository, cluster, name string, data []byte) *points.Point {
	t.Helper()
	v, err := points.ParseVolume(name, cluster)
	if err != nil {
		t.Fatal(err)
	}
	p, _, err := backup.Run(t.Context(), r, backup.Options{Volume: v, Disk: memory(data)})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func openCatalog(t *testing.T, r *repository.Repository, opt Options) *Catalog {
	t.Helper()
	if opt.Cluster == "" {
		opt.Cluster = "c"
	}
	cache := image.NewCache(32 << 20)
	t.Cleanup(cache.Close)
	c, err := Open(t.Context(), r, cache, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return c
}

func text(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = seed + byte(i>>9)
	}
	return p
}

func (c *Catalog) mustOpen(t *testing.T, name string) *nbdserver.Opened {
	t.Helper()
	o, err := c.Open(t.Context(), name, nbdserver.Client{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	return o
}

func TestNames(t *testing.T) {
	r := repotest.New(t).Open(t)
	prod := save(t, r, "prod", "shop/db", text(70_000, 1))
	other := save(t, r, "test", "shop/db", text(70_000, 2))
	web := save(t, r, "prod", "shop/web", text(70_000, 3))
	own := save(t, r, "c", "shop/queue", text(70_000, 4))
	save(t, r, "prod", "shop/queue", text(70_000, 5))
	c := openCatalog(t, r, Options{})
	if names, _ := c.Points(); !slices.Contains(names, own.Name()) || !slices.Contains(names, "prod:"+web.Name()) {
		t.Errorf("exports %q: this cluster's have no cluster in their names, others have", names)
	}
	for name, want := range map[string]*points.Point{
		"prod:" + prod.Name():  prod,
		"test:shop/db@latest":  other,
		"shop/queue@latest":    own, // not that of prod
		web.Name():             web,
		"shop/web@latest":      web,
		prod.ID:                prod,
		web.ID[:8]:             web,
		"shop/db@latest":       nil, // of which cluster?
		"":                     nil,
		"shop/web@latest~1":    nil,
		"shop/web":             nil,
		"shop/web@latest/../x": nil,
	} {
		o, err := c.Open(t.Context(), name, nbdserver.Client{})
		switch {
		case want == nil:
			if !errors.Is(err, nbdserver.ErrUnknownExport) {
				t.Errorf("%q opens: %v", name, err)
			}
		case err != nil:
			t.Errorf("%q: %v", name, err)
		default:
			p := make([]byte, 1)
			if _, err := o.ReadAt(t.Context(), p, 0); err != nil || p[0] != map[*points.Point]byte{prod: 1, other: 2, web: 3, own: 4}[want] {
				t.Errorf("%q reads as %d: %v", name, p[0], err)
			}
			o.Close()
		}
	}
	told := ""
	only := openCatalog(t, r, Options{Select: []string{"shop/web"}, Fallback: func(name string, v points.Volume) { told = name + " " + v.FullName() }})
	if o := only.mustOpen(t, ""); o.Name != "prod:"+web.Name() || told != "shop/web prod:shop/web" {
		t.Errorf("the empty name means %s, the user is told %q", o.Name, told)
	}
	mine := openCatalog(t, r, Options{Select: []string{"shop/queue"}})
	if o := mine.mustOpen(t, ""); o.Name != own.Name() {
		t.Errorf("a volume that this cluster has is %s", o.Name)
	}
	if _, err := Open(t.Context(), r, image.NewCache(0), Options{Select: []string{"shop/no@latest"}}); !errors.Is(err, points.ErrNoSuchPoint) {
		t.Errorf("a point that is not there was selected: %v", err)
	}
}

// A client learns nothing through dirty bitmaps of points that it may not open, under any of
// their names, and still reads what it may.
func TestRestrictedContexts(t *testing.T) {
	r := repotest.New(t).Open(t)
	var pts []*points.Point
	for i := range 3 {
		pts = append(pts, save(t, r, "c", "shop/db", text(70_000, byte(i))))
	}
	open := func(opt Options, allowed ...*points.Point) *nbdserver.Opened {
		t.Helper()
		var rules []nbdserver.AccessRule
		for _, p := range allowed {
			rules = append(rules, nbdserver.AccessRule{Client: "team", Export: p.Name()})
		}
		o, err := nbdserver.Restrict(openCatalog(t, r, opt), rules).Open(t.Context(), allowed[0].Name(), nbdserver.Client{Names: []string{"team"}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(o.Close)
		return o
	}
	dirty := func(name string) string { return proto.ContextDirtyBitmap + name }
	for name, opt := range map[string]Options{"read-only": {}, "padded": {Pad: 512},
		"writable": {Writable: &Overlays{Dir: filepath.Join(t.TempDir(), "overlays")}}} {
		o := open(opt, pts[2], pts[0])
		if _, ok := o.Export.(nbdserver.Writer); ok != (opt.Writable != nil) {
			t.Errorf("%s: a writer: %v", name, ok)
		}
		s := o.Export.(nbdserver.Statuser)
		got, err := s.Contexts(t.Context())
		if want := []string{contextDepth, dirty(pts[0].Name())}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: listed %q, %v", name, got, err)
		}
		for _, known := range []string{contextDepth, dirty(pts[0].Name()), dirty(pts[0].ID), dirty("shop/db@latest~2")} {
			changed := false
			err := s.Status(t.Context(), known, 0, o.Size(), func(_ int64, flags uint32) bool { changed = flags != 0; return false })
			if !s.HasContext(t.Context(), known) || err != nil || !changed {
				t.Errorf("%s: %s: %v", name, known, err)
			}
		}
		for _, hidden := range []string{dirty(pts[1].Name()), dirty(pts[1].ID), dirty("shop/db@latest~1")} {
			err := s.Status(t.Context(), hidden, 0, 512, func(int64, uint32) bool { t.Errorf("%s: told of %s", name, hidden); return false })
			if s.HasContext(t.Context(), hidden) || !errors.Is(err, nbdserver.ErrUnknownExport) {
				t.Errorf("%s: %s: %v", name, hidden, err)
			}
		}
		p := make([]byte, 4096)
		if _, err := o.ReadAt(t.Context(), p, 8192); err != nil || !bytes.Equal(p, text(70_000, 2)[8192:8192+4096]) {
			t.Errorf("%s: reads differ: %v", name, err)
		}
		pieces, err := o.Export.(nbdserver.Lender).Lend(t.Context(), nil, 8192, 4096, true)
		if err != nil || len(pieces) == 0 {
			t.Errorf("%s: lent %d pieces, %v", name, len(pieces), err)
		}
	}
}

// Every way to read a disk returns the same bytes, at any edge of blocks.
func TestDiskReads(t *testing.T) {
	r := repotest.New(t).Open(t)
	data := text(1<<20+777, 0)
	clear(data[300_000:800_000])
	p := save(t, r, "c", "shop/db", data)
	c := openCatalog(t, r, Options{Pad: 512})
	o := c.mustOpen(t, p.Name())
	padded := append(bytes.Clone(data), make([]byte, 512-777%512)...)
	if padded = padded[:o.Size()]; int64(len(padded)) != o.Size() || o.Size()%512 != 0 {
		t.Fatalf("padded to %d", o.Size())
	}
	lender := o.Export.(nbdserver.Lender)
	flat := func(pieces []nbdserver.Piece) (out []byte) {
		for _, q := range pieces {
			if q.Data == nil {
				out = append(out, make([]byte, q.Zeroes)...)
			}
			out = append(out, q.Data...)
		}
		return out
	}
	if _, err := lender.Lend(t.Context(), nil, 0, 4096, false); !errors.Is(err, nbdserver.ErrNotCached) {
		t.Errorf("lent what was never read: %v", err)
	}
	for off := int64(0); off < o.Size(); off += 65_521 {
		n := int(min(130_000, o.Size()-off))
		got := make([]byte, n)
		if _, err := o.ReadAt(t.Context(), got, off); err != nil || !bytes.Equal(got, padded[off:off+int64(n)]) {
			t.Errorf("read %d at %d: %v", n, off, err)
		}
		for _, wait := range []bool{true, false} {
			pieces, err := lender.Lend(t.Context(), make([]nbdserver.Piece, 0, 1), off, n, wait)
			if err != nil || !bytes.Equal(flat(pieces), got) {
				t.Errorf("lent %d at %d, waiting %v: %v", n, off, wait, err)
			}
		}
	}
	at := int64(0)
	if err := o.Extents(t.Context(), 0, o.Size(), func(n int64, hole, zero bool) bool {
		if hole != zero || zero && len(bytes.Trim(padded[at:at+n], "\x00")) > 0 {
			t.Errorf("extent at %d of %d: hole %v, zero %v", at, n, hole, zero)
		}
		at += n
		return true
	}); err != nil || at != o.Size() {
		t.Errorf("extents end at %d: %v", at, err)
	}
}

// The conformance suite over a recovery point, with and without a local copy.
func TestConformance(t *testing.T) {
	r := repotest.New(t).Open(t)
	v, err := points.ParseVolume("shop/db", "c")
	if err != nil {
		t.Fatal(err)
	}
	// The holes of the suite's image are of 64 KiB.
	p, _, err := backup.Run(t.Context(), r, backup.Options{Volume: v, Disk: memory(nbdtest.Image()), BlockSize: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	for _, hydrated := range []bool{false, true} {
		t.Run(fmt.Sprintf("hydrated=%v", hydrated), func(t *testing.T) {
			nbdtest.Run(t, nbdtest.Traits{}, func(t *testing.T) nbdtest.Target {
				opt := Options{}
				if hydrated {
					copies, err := hydrate.New(hydrate.Options{Dir: filepath.Join(t.TempDir(), "copies")})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() {
						if err := copies.Close(); err != nil {
							t.Error(err)
						}
					})
					opt.Hydrate = copies
				}
				_, socket := nbdtest.Serve(t, nbdserver.Config{Catalog: openCatalog(t, r, opt)})
				return nbdtest.Target{Export: p.Name(), Dial: nbdtest.DialUnix(socket)}
			})
		})
	}
}

// The error of a missing block names it and the point, and what is before it is lent.
func TestMissingBlock(t *testing.T) {
	repo := repotest.New(t)
	r := repo.Open(t)
	p := save(t, r, "c", "shop/db", text(1<<20, 0))
	c := openCatalog(t, r, Options{})
	o := c.mustOpen(t, p.Name())
	if err := o.Extents(t.Context(), 0, 1, func(int64, bool, bool) bool { return false }); err != nil { // loads the indexes
		t.Fatal(err)
	}
	for _, pack := range repo.Packs(t) {
		if pack[0] == 'p' {
			repo.RemoveBlob(t, pack)
		}
	}
	_, err := o.ReadAt(t.Context(), make([]byte, 4096), 0)
	if !errors.Is(err, repository.ErrContentMissing) || !bytes.Contains([]byte(err.Error()), []byte(p.Name()+": block at 0x0")) {
		t.Errorf("%v", err)
	}
	var at *nbdserver.OffsetError
	if _, err := o.Export.(nbdserver.Lender).Lend(t.Context(), nil, 70_000, 100, true); !errors.As(err, &at) || at.Offset != 70_000 {
		t.Errorf("%v", err)
	}
}

// A point that was deleted before its lease was written is not read on, in any way, and not entered again.
func TestDeletedBeforeItsLease(t *testing.T) {
	r := repotest.New(t).Open(t)
	p := save(t, r, "c", "shop/db", text(70_000, 1))
	c := openCatalog(t, r, Options{Linger: time.Minute})
	o := c.mustOpen(t, p.Name())
	if err := forget(t, r, p); err != nil {
		t.Fatal(err)
	}
	if err := o.Enter(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	read := func() error {
		_, err := o.ReadAt(t.Context(), make([]byte, 4096), 0)
		return err
	}
	for !errors.Is(read(), points.ErrNoSuchPoint) { // it is found in the background
		time.Sleep(time.Millisecond)
	}
	if err := read(); !bytes.Contains([]byte(err.Error()), []byte(p.Name())) {
		t.Errorf("the error does not name the point: %v", err)
	}
	for _, wait := range []bool{true, false} {
		if pieces, err := o.Export.(nbdserver.Lender).Lend(t.Context(), nil, 0, 4096, wait); !errors.Is(err, points.ErrNoSuchPoint) || len(pieces) != 0 {
			t.Errorf("lent %d pieces, waiting %v: %v", len(pieces), wait, err)
		}
	}
	if err := o.Enter(t.Context(), nil); !errors.Is(err, nbdserver.ErrUnknownExport) {
		t.Errorf("entered again: %v", err)
	}
}

// Points that are no longer in use are closed, and their leases released.
func TestLinger(t *testing.T) {
	r := repotest.New(t).Open(t)
	p := save(t, r, "c", "shop/db", text(70_000, 1))
	c := openCatalog(t, r, Options{Linger: time.Millisecond})
	leases := func() int {
		t.Helper()
		held, err := points.Leases(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		return len(held[p.ID])
	}
	o, err := c.Open(t.Context(), p.Name(), nbdserver.Client{})
	if err != nil {
		t.Fatal(err)
	}
	if n := leases(); n != 0 {
		t.Errorf("%d leases before anybody stays", n)
	}
	if err := o.Enter(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for leases() != 1 { // it is taken in the background
		time.Sleep(time.Millisecond)
	}
	o.Close()
	for leases() > 0 {
		if err := t.Context().Err(); err != nil {
			t.Fatal(err)
		}
	}
}

// Thousands of points are listed without opening any.
func TestManyPoints(t *testing.T) {
	pts := 10_000
	if testing.Short() {
		pts = 500
	}
	repo := repotest.New(t)
	r := repo.Open(t)
	p := save(t, r, "c", "shop/db", text(70_000, 1))
	ctx := t.Context()
	s, err := r.LoadSnapshot(ctx, p.ManifestID)
	if err != nil {
		t.Fatal(err)
	}
	files, err := r.ReadDirectory(ctx, s.Root)
	if err != nil {
		t.Fatal(err)
	}
	w, err := r.NewWriter(ctx, "test")
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i < pts; i++ {
		at := p.Time.Add(time.Duration(i) * time.Second)
		s.Start, s.End = at, at
		s.Tags["varve-id"], s.Tags["varve-generation"], s.Tags["varve-time"] = fmt.Sprintf("%032x", i), fmt.Sprint(i+1), at.Format(time.RFC3339Nano)
		if err := w.SaveSnapshot(ctx, s, files); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Flush(ctx), w.Close()); err != nil {
		t.Fatal(err)
	}
	r = repo.Open(t) // cold
	start := time.Now()
	c := openCatalog(t, r, Options{})
	t.Logf("the catalogue of %d points was ready in %v", pts, time.Since(start))
	start = time.Now()
	if err := c.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("a refresh took %v", time.Since(start))
	listed := 0
	if err := c.List(ctx, nbdserver.Client{}, func(nbdserver.Listing) bool { listed++; return true }); err != nil || listed != pts {
		t.Errorf("%d exports, %v", listed, err)
	}
	last := c.mustOpen(t, "shop/db@latest")
	names, err := last.Export.(nbdserver.Statuser).Contexts(ctx)
	if err != nil || len(names) != pts {
		t.Errorf("%d contexts, %v", len(names), err)
	}
	if _, err := io.ReadFull(io.NewSectionReader(nbdserver.NewBackend(ctx, last.Export), 0, 70_000), make([]byte, 70_000)); err != nil {
		t.Error(err)
	}
}

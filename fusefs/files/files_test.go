package files_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/fusefs/files"
)

// site is a repository with points of one disk, an ext4, and an edit between each two.
type site struct {
	repo *repository.Repository
	held *disks.Disks
	pts  []*points.Point
}

var volume = points.Volume{Cluster: "test", Namespace: "shop", Name: "db"}

func newSite(t *testing.T) *site {
	t.Helper()
	diskfstest.NeedTool(t, "mke2fs")
	diskfstest.NeedTool(t, "debugfs")
	dir := t.TempDir()
	src, img, other := filepath.Join(dir, "src"), filepath.Join(dir, "disk.img"), filepath.Join(dir, "other")
	data := bytes.Repeat([]byte("data"), 25_000)
	if err := errors.Join(os.MkdirAll(filepath.Join(src, "etc"), 0o755), os.WriteFile(filepath.Join(src, "etc/conf"), []byte("port=1\n"), 0o640),
		os.WriteFile(filepath.Join(src, "data"), data, 0o644), os.Symlink("etc/conf", filepath.Join(src, "link")), os.WriteFile(other, []byte("other"), 0o600)); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", src, img, "16M")
	s := emptySite(t)
	for _, edit := range []func(){
		func() {},
		func() { diskfstest.Run(t, "debugfs", "-w", "-R", "write "+other+" new", img) },
		func() { // a byte of data changes, but no metadata
			b, err := os.ReadFile(img)
			if err != nil {
				t.Fatal(err)
			}
			b[bytes.Index(b, data[:50_000])+20_000]++
			if err := os.WriteFile(img, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		func() { diskfstest.Run(t, "debugfs", "-w", "-R", "rm data", img) },
	} {
		edit()
		s.backup(t, img)
	}
	return s
}

func emptySite(t *testing.T) *site {
	t.Helper()
	s := &site{repo: repotest.New(t).Open(t)}
	cache := image.NewCache(32 << 20)
	s.held = disks.New(s.repo, cache, disks.Options{Purpose: "test", Lease: disks.Late})
	t.Cleanup(func() {
		if err := s.held.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
		cache.Close()
	})
	return s
}

// backup makes a point of a disk.
func (s *site) backup(t *testing.T, img string) {
	t.Helper()
	d, err := disk.Open(img, disk.Options{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	p, _, err := backup.Run(t.Context(), s.repo, backup.Options{Volume: volume, Disk: d})
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
	s.pts = append(s.pts, p)
}

// compare lists what differs between two points.
func (s *site) compare(t *testing.T, older, newer int) (string, error) {
	t.Helper()
	a, b := s.open(t, s.pts[older]), s.open(t, s.pts[newer])
	defer a.Close()
	defer b.Close()
	var got []string
	err := files.Compare(t.Context(), a, b, diskfs.Options{}, files.Report{
		Change: func(c files.Change) error {
			got = append(got, strings.TrimSpace(c.Change+" "+c.Path+" "+strings.Join(c.What, " ")))
			if (c.From == nil) != (c.Change == "added") || (c.To == nil) != (c.Change == "removed") {
				t.Errorf("%+v", c)
			}
			return nil
		},
		Damaged: func(p *points.Point, name string, err error) error {
			return fmt.Errorf("%s:%s: %w", p.Name(), name, err)
		},
	})
	return strings.Join(got, ", "), err
}

func (s *site) open(t *testing.T, p *points.Point) *files.Point {
	t.Helper()
	f, err := files.Open(t.Context(), s.held, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestFind opens the file system that a path lies in.
func TestFind(t *testing.T) {
	s := newSite(t)
	f := s.open(t, s.pts[0])
	defer f.Close()
	fsys, inside, err := f.Find("/etc/conf", diskfs.Options{})
	if err != nil || inside != "etc/conf" {
		t.Fatalf("%q, %v", inside, err)
	}
	c, err := fsys.Open(inside)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); err != nil || string(b) != "port=1\n" {
		t.Errorf("%q, %v", b, err)
	}
	if v, inside := f.Volume("/"); v == nil || v.Type != "ext4" || inside != "." {
		t.Errorf("the root is %q of %+v", inside, v)
	}
	if f.Name() != s.pts[0].Name() || f.Point() != s.pts[0] || len(f.Disk().Volumes) != 1 {
		t.Errorf("%s, %+v", f.Name(), f.Disk())
	}
}

// TestHistory groups points by the states of a file.
func TestHistory(t *testing.T) {
	s := newSite(t)
	for _, c := range []struct{ name, want string }{
		{"/data", "0-1 100000, 2-2 100000, 3-3 none"},
		{"/etc/conf", "0-3 7"},
		{"/new", "0-0 none, 1-3 5"},
		{"/link", "0-3 8"},
		{"/nothing", "0-3 none"},
		{"/etc/conf/below", "0-3 none"},
	} {
		list, err := files.History(t.Context(), s.held, s.pts, c.name, diskfs.Options{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, v := range list {
			size := "none"
			if v.File != nil {
				size = fmt.Sprint(v.File.Size)
			}
			first, last := slices.Index(s.pts, v.First), slices.Index(s.pts, v.Last)
			got = append(got, fmt.Sprintf("%d-%d %s", first, last, size))
			if v.Err != nil || v.Points != last-first+1 {
				t.Errorf("%s: %+v", c.name, v)
			}
		}
		if got := strings.Join(got, ", "); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestCompare lists what differs between two points, either way round.
func TestCompare(t *testing.T) {
	s := newSite(t)
	for _, c := range []struct {
		older, newer int
		want         string
	}{
		{0, 0, ""},
		{0, 1, "added /new"},
		{1, 2, "changed /data content"},
		{0, 3, "removed /data, added /new"},
		{3, 0, "added /data, removed /new"},
	} {
		if got, err := s.compare(t, c.older, c.newer); err != nil || got != c.want {
			t.Errorf("%d to %d: %s, %v; want %s", c.older, c.newer, got, err, c.want)
		}
	}
	enough := errors.New("enough")
	a, b := s.open(t, s.pts[0]), s.open(t, s.pts[3])
	defer a.Close()
	defer b.Close()
	if err := files.Compare(t.Context(), a, b, diskfs.Options{}, files.Report{Change: func(files.Change) error { return enough }}); !errors.Is(err, enough) {
		t.Errorf("not ended by its receiver: %v", err)
	}
}

// TestSplitPath splits POINT:/PATH, where either may contain ':' and '@'.
func TestSplitPath(t *testing.T) {
	s := newSite(t)
	cat, err := points.List(t.Context(), s.repo, points.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	names := points.Names{Catalog: cat, Cluster: "test"}
	for arg, want := range map[string]string{
		"shop/db@latest":                "/",
		"shop/db@latest:":               "/",
		"shop/db@latest:/etc/conf":      "/etc/conf",
		s.pts[3].Name() + ":/a:/b@c":    "/a:/b@c",
		s.pts[3].ID + ":/etc":           "/etc",
		"test:shop/db@latest:/etc/conf": "/etc/conf",
	} {
		p, path, err := files.SplitPath(names, arg)
		if err != nil || p.ID != s.pts[3].ID || path != want {
			t.Errorf("%s: %v, %q, %v", arg, p, path, err)
		}
	}
	if _, _, err := files.SplitPath(names, "shop/db@latest:etc/conf"); !errors.Is(err, files.ErrPath) {
		t.Errorf("a path without its slash: %v", err)
	}
	if _, _, err := files.SplitPath(names, "shop/nothing@latest:/etc"); !errors.Is(err, points.ErrNoSuchPoint) {
		t.Errorf("a point that is not there: %v", err)
	}
}

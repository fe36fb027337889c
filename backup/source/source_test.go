package source_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/source"
)

var _ backup.Disk = source.Bytes(nil)

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	content := bytes.Repeat([]byte("disk"), 1024)
	if err := errors.Join(os.WriteFile("disk.img", content, 0o600), os.MkdirAll("odd:/", 0o700), os.WriteFile("odd:/disk", content, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"disk.img", filepath.Join(dir, "disk.img"), "odd://disk"} {
		s, err := source.Open(t.Context(), name, source.Options{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		disks := s.Disks()
		if len(disks) != 1 || disks[0].Kind != "image file" || disks[0].Name != "" || len(disks[0].Changes)+len(disks[0].Notes) > 0 || disks[0].Live {
			t.Errorf("%s: %+v", name, disks)
		}
		got := make([]byte, len(content))
		if _, err := disks[0].Bytes.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) || disks[0].Bytes.Size() != int64(len(content)) {
			t.Errorf("%s reads other bytes, or %v", name, err)
		}
		if err := errors.Join(s.Check(t.Context()), s.Commit(t.Context()), s.Close()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := source.Open(t.Context(), "ftp://host/disk", source.Options{}); !errors.Is(err, source.ErrScheme) || !strings.Contains(err.Error(), "ftp") {
		t.Errorf("an unknown scheme: %v", err)
	}
	if _, err := source.Open(t.Context(), "nothing.img", source.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestExtents(t *testing.T) {
	const rbd = `[{"offset":0,"length":4096,"exists":"true"}]`
	for _, c := range []struct {
		name string
		x    source.Extents
		want string // part of the error; empty for none
		tool bool
	}{
		{"recognised as a tool's", source.Extents{List: strings.NewReader(rbd), Format: "auto", Target: "snap"}, "", true},
		{"by name", source.Extents{List: strings.NewReader(rbd), Format: "rbd", Target: "snap", Base: "before"}, "", true},
		{"Varve's own", source.Extents{List: strings.NewReader(`{"version":1}`)}, "", false},
		{"without a state", source.Extents{List: strings.NewReader(rbd), Format: "rbd"}, "--extents-target", false},
		{"with a state too many", source.Extents{List: strings.NewReader(`{}`), Format: "varve", Base: "x"}, "names its states itself", false},
		{"thin_delta without a base", source.Extents{List: strings.NewReader(""), Format: "thin_delta", Target: "snap"}, "--extents-base", false},
		{"thin_delta", source.Extents{List: strings.NewReader(""), Format: "thin_delta", Target: "snap", Base: "before"}, "", false},
		{"unknown", source.Extents{List: strings.NewReader(rbd), Format: "zfs"}, `not "zfs"`, false},
	} {
		s, err := c.x.Source()
		if c.want != "" {
			if !errors.Is(err, source.ErrExtents) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if _, tool := s.(*cbt.ToolExtents); err != nil || s == nil || tool != c.tool {
			t.Errorf("%s: %T, %v", c.name, s, err)
		}
	}
}

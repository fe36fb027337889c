package source_test

import (
	"context"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/source"
)

// renamed is a source whose bitmaps have the names of the listing, not those that were chosen
// for them, and the volume that a user names.
type renamed struct {
	cbt.Source

	old string
	l   cbttest.Listing
}

func (r renamed) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	if req.Base != nil && req.Base.ChangeID == r.l.Base {
		b := *req.Base
		b.ChangeID = r.old
		req.Base = &b
	}
	rep, err := r.Source.Changes(ctx, req, emit)
	if rep.BaseChangeID == r.old {
		rep.BaseChangeID = r.l.Base
	}
	if rep.TargetChangeID != "" {
		rep.TargetChangeID = r.l.Target
	}
	rep.VolumeHandle = r.l.Volume
	return rep, err
}

// TestQMPConforms has a real QEMU say what the rules of all sources ask for.
func TestQMPConforms(t *testing.T) {
	t.Parallel()
	cbttest.All(t, notSaid(), func(t *testing.T, l cbttest.Listing) cbt.Source {
		d := startDaemon(t, diskOf{name: "vda", format: "raw", size: l.Size})
		f, err := os.OpenFile(d.guest["vda"], os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		before := machine{}
		if l.Base != "" {
			d.write(t, "vda", 1, 0, l.Size)
			before = before.mustBackup(t, d, nil)
			bitmap := map[string]any{"node": "vda", "name": before["vda"].id}
			d.do(t, "block-dirty-bitmap-remove", bitmap)
			bitmap["granularity"] = 4096 // what the rules count in
			d.do(t, "block-dirty-bitmap-add", bitmap)
		}
		for _, e := range l.Extents {
			if e.Zero {
				if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.Offset, e.Length); err != nil {
					t.Fatal(err)
				}
				continue
			}
			d.write(t, "vda", 2, e.Offset, e.Length)
		}
		s, err := source.Open(t.Context(), d.uri(), before.options(t.TempDir()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		changes := s.Disks()[0].Changes
		if l.Base == "" {
			return renamed{changes[1], "", l}
		}
		return renamed{changes[0], before["vda"].id, l}
	})
}

package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// DepthContext is the metadata context that reports what an overlay changed: it
// has depth 1 on a writable export.
const DepthContext = contextDepth

// Written is a recovery point with what was written over it: the disk and the source of
// changed blocks for a backup that saves it.
type Written struct {
	// Base is the point below.
	Base *points.Point

	size int64
	read func(p []byte, off int64) error
	// dirty reports the changed runs in order until yield returns false.
	dirty func(ctx context.Context, yield func(off, length int64, zero bool) bool) error
	close func() error
}

var (
	_ backup.Disk = (*Written)(nil)
	_ cbt.Source  = (*Written)(nil)
)

// ErrNotWritable means that an export has no overlay to save.
var ErrNotWritable = errors.New("the export is read-only, so there is nothing to save: serve it with --writable")

// WrittenOver returns what clients wrote to an export of a Varve server, read by a connection
// to it. The connection must have DepthContext; its owner closes it.
func WrittenOver(ctx context.Context, e *nbdclient.Export, cat *points.Catalog) (*Written, error) {
	if e.Flags&proto.FlagReadOnly != 0 {
		return nil, ErrNotWritable
	}
	base, err := pointBeneath(e, cat)
	if err != nil {
		return nil, err
	}
	ctx = context.WithoutCancel(ctx)
	return &Written{
		Base: base, size: int64(e.Size), close: func() error { return nil },
		read: func(p []byte, off int64) error {
			for len(p) > 0 {
				n := min(len(p), 1<<20)
				if _, err := e.ReadAt(ctx, p[:n], off); err != nil {
					return err
				}
				p, off = p[n:], off+int64(n)
			}
			return nil
		},
		dirty: func(ctx context.Context, yield func(int64, int64, bool) bool) error {
			return e.Map(ctx, DepthContext, 0, int64(e.Size), func(off int64, x nbdclient.Extent) bool {
				return x.Flags != 1 || yield(off, x.Length, false)
			})
		},
	}, nil
}

// pointBeneath finds the point of an export by the ID in its description: its name follows
// the rule of the server's cluster, which may be another.
func pointBeneath(e *nbdclient.Export, cat *points.Catalog) (*points.Point, error) {
	for _, p := range cat.Points() {
		if d := description(p); e.Description == d || strings.HasPrefix(e.Description, d+overlayMark) {
			return p, nil
		}
	}
	return nil, fmt.Errorf("%w: export %s (%s) is of no point of this repository", points.ErrNoSuchPoint, e.Name, e.Description)
}

// KeptOverlay opens an overlay that a server left, over its point.
func KeptOverlay(ctx context.Context, repo *repository.Repository, cache *image.Cache, p *points.Point, dir string, log *slog.Logger) (_ *Written, err error) {
	// A directory of a killed server must not be deleted during this.
	held, err := overlay.HoldDir(filepath.Dir(dir))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, held.Close())
		}
	}()
	set := disks.New(repo, cache, disks.Options{Purpose: "commit", Lease: disks.AtOnce, Log: log})
	defer func() {
		if err != nil {
			err = errors.Join(err, set.Close(ctx))
		}
	}()
	d, err := set.Hold(ctx, p)
	if err != nil {
		return nil, err
	}
	o, err := d.KeptOverlay(dir)
	if errors.Is(err, overlay.ErrInUse) {
		return nil, fmt.Errorf("%w: name the export of the server that uses it, by its NBD URI", err)
	}
	if err != nil {
		return nil, err
	}
	return &Written{
		Base: p, size: o.Size(), close: func() error {
			return errors.Join(o.Close(), held.Close(), set.Close(context.WithoutCancel(ctx)))
		},
		read: func(b []byte, off int64) error {
			_, err := o.ReadAt(context.WithoutCancel(ctx), b, off)
			return err
		},
		dirty: func(_ context.Context, yield func(int64, int64, bool) bool) error {
			o.Dirty(yield)
			return nil
		},
	}, nil
}

// Size returns the disk's size in bytes.
func (w *Written) Size() int64 { return w.size }

// CheckSize never fails: neither exports nor overlays change their size.
func (w *Written) CheckSize() error { return nil }

// ReadAt reads as io.ReaderAt does.
func (w *Written) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > w.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), w.size-off))
	if err := w.read(p[:n], off); err != nil {
		return 0, err
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Changes lists what was written over Base, and refuses any other base.
func (w *Written) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	const source = "overlay"
	switch {
	case req.Base == nil || req.Base.PointID != w.Base.ID:
		return cbt.Report{}, &cbt.Error{Source: source, Kind: cbt.ErrBaseMismatch, Detail: "an overlay knows only what differs from " + w.Base.Name()}
	case req.Size != w.size:
		return cbt.Report{}, &cbt.Error{Source: source, Kind: cbt.ErrSizeMismatch, Detail: fmt.Sprintf("the overlay has %s, and the disk has %s", bytesize.Exact(w.size), bytesize.Exact(req.Size))}
	}
	report := cbt.Report{Source: source, BaseChangeID: req.Base.ChangeID, Size: w.size, Exact: true}
	var failed error
	err := w.dirty(ctx, func(off, length int64, zero bool) bool {
		if failed = ctx.Err(); failed == nil {
			failed = emit(cbt.Extent{Offset: off, Length: length, Zero: zero})
		}
		report.Reported += length
		return failed == nil
	})
	if err = errors.Join(failed, err); err != nil {
		return cbt.Report{}, err
	}
	return report, nil
}

// Close closes the overlay, which does not change.
func (w *Written) Close() error { return w.close() }

package backup

import (
	"context"
	"errors"
	"fmt"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/internal/bytesize"
)

// list asks the sources what changed, one after the other until one answers, and fills the
// worklist.
func (r *run) list(ctx context.Context) error {
	req := cbt.Request{Size: r.lay.Size}
	if r.parent != nil {
		req.Base = &cbt.Base{
			PointID: r.parent.ID, ChangeID: r.parent.ChangeID, SnapshotHandle: r.parent.SnapshotHandle,
			VolumeHandle: r.parent.VolumeHandle, Size: r.parent.Size,
		}
	}
	rep, err := r.askSources(ctx, req)
	if err != nil {
		return fmt.Errorf("list changed blocks of %s: %w", r.opt.Volume, err)
	}
	r.rec.Source, r.rec.ChangeID, r.rec.SnapshotHandle = rep.Source, rep.TargetChangeID, rep.SnapshotHandle
	if rep.VolumeHandle != "" {
		r.rec.VolumeHandle = rep.VolumeHandle
	}
	if rep.Allocated && r.parent != nil {
		// What is not allocated reads as zeroes now.
		r.work.zeroRest()
	}
	if r.parent != nil {
		r.work.addResize(r.parent.Size)
	}
	if err := r.addUnread(ctx); err != nil {
		return err
	}
	r.rec.Stats.Reported = rep.Reported
	return r.spotCheck(ctx, rep)
}

// addUnread adds what could not be read for the parent: no source reports it as changed, and
// its zeroes would count as the disk's bytes.
func (r *run) addUnread(ctx context.Context) error {
	if r.parent == nil || r.parent.Unread == 0 {
		return nil
	}
	rec, err := points.LoadRecord(ctx, r.repo, r.parent)
	if err != nil {
		return fmt.Errorf("which ranges of %s could not be read: %w", r.parent.Name(), err)
	}
	_, none := r.opt.Disk.(NoDisk)
	for _, bad := range rec.ReadErrors {
		n := min(bad.Length, r.lay.Size-bad.Offset)
		switch {
		case n <= 0: // beyond the end of a disk that shrank
		case none:
			r.readErrors.add(bad.Offset, n)
		default:
			if err := r.work.add(cbt.Extent{Offset: bad.Offset, Length: n}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *run) askSources(ctx context.Context, req cbt.Request) (cbt.Report, error) {
	sources := append([]cbt.Source{r.opt.Source}, r.opt.Fallback...)
	if r.opt.Source == nil {
		sources[0] = cbt.Compare{}
	}
	for {
		rep, err := sources[0].Changes(ctx, req, r.work.add)
		if err == nil {
			err = r.checkReport(req, rep)
		}
		if err == nil {
			r.settleFallbacks(ctx, rep.Source)
			return rep, nil
		}
		reason, fallback := cbt.FallbackReason(err)
		if len(sources) == 1 || !fallback && !errors.Is(err, cbt.ErrNoBase) {
			return cbt.Report{}, err
		}
		sources = sources[1:]
		r.work.reset()
		if !fallback {
			continue // ErrNoBase: a full needs no difference
		}
		f := blocktree.Fallback{Reason: string(reason), Detail: err.Error()}
		var e *cbt.Error
		if errors.As(err, &e) {
			f.From = e.Source
		}
		r.rec.Fallbacks = append(r.rec.Fallbacks, f)
	}
}

// settleFallbacks completes the recorded fallbacks with the source that answered, and reports
// them.
func (r *run) settleFallbacks(ctx context.Context, source string) {
	for i := len(r.rec.Fallbacks) - 1; i >= 0; i-- {
		r.rec.Fallbacks[i].To = source
		source = r.rec.Fallbacks[i].From
	}
	for _, f := range r.rec.Fallbacks {
		r.tellFallback(ctx, f)
	}
}

func (r *run) tellFallback(ctx context.Context, f blocktree.Fallback) {
	r.repo.Log().WarnContext(ctx, "changed blocks come from another source than requested", "volume", r.opt.Volume.String(),
		"from", f.From, "to", f.To, "reason", f.Reason, "detail", f.Detail)
	r.opt.OnFallback(f)
}

func (r *run) checkReport(req cbt.Request, rep cbt.Report) error {
	if rep.Size != r.lay.Size {
		return fmt.Errorf("%w: %s, and the disk has %s", cbt.ErrSizeMismatch, bytesize.Exact(rep.Size), bytesize.Exact(r.lay.Size))
	}
	if rep.Exact && req.Base != nil && !rep.Allocated && rep.BaseChangeID != req.Base.ChangeID {
		return fmt.Errorf("%w: it is relative to %q, the parent %s is %q",
			cbt.ErrBaseMismatch, rep.BaseChangeID, r.parent.Name(), req.Base.ChangeID)
	}
	return nil
}

// NoDisk stands in for the disk of an increment whose source is known to list no change. Its
// value is the parent's size. VerifyUnchanged must be 0, since there is nothing to check; a
// source that lists a change fails the backup.
type NoDisk int64

// Size implements Disk.
func (d NoDisk) Size() int64 { return int64(d) }

// CheckSize implements Disk.
func (NoDisk) CheckSize() error { return nil }

// ReadAt implements io.ReaderAt: it fails.
func (NoDisk) ReadAt([]byte, int64) (int, error) { return 0, ErrNoDisk }

// ErrNoDisk means that a NoDisk would have to be read.
var ErrNoDisk = errors.New("something did change, and there is no disk to read it from; run the backup with the disk")

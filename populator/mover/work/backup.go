package work

import (
	"context"
	"errors"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

func makePoint(ctx context.Context, e Environment, t mover.Task, repo *store.Open) (mover.Result, error) {
	if done, ok, err := Done(ctx, repo.Repository, t.Backup); err != nil || ok {
		return done, err
	}
	src, err := openDevice(e.Device)
	if err != nil {
		return mover.Result{}, err
	}
	defer src.Close()
	opt := Options(t.Backup, e.Version)
	opt.Disk = src
	if err := checkLength(ctx, repo.Repository, t.Backup, src.Size()); err != nil {
		return mover.Result{}, err
	}
	if e.Probe != nil {
		// That none is known is no error: a database may have the device for itself.
		if fs, err := e.Probe(src, src.Size()); err == nil {
			opt.FileSystem = fs
		}
	}
	say := &reporter{w: e.Log}
	opt.Progress = func(p backup.Progress) { say.Tell(mover.Progress{Phase: p.Phase, Done: p.Done, Total: p.Total}) }

	return Make(ctx, repo.Repository, t.Backup, opt)
}

// checkLength refuses a device that cannot be the whole of the volume: a volume never
// shrinks, so one shorter than its latest point is a driver's mistake.
func checkLength(ctx context.Context, repo *repository.Repository, t *mover.BackupTask, size int64) error {
	cat, err := backup.List(ctx, repo, backup.ListOptions{Volume: &t.Volume})
	if err != nil {
		return err
	}
	p := cat.Latest(t.Volume)
	if size == 0 || p != nil && p.VolumeHandle == t.Changed.Target.VolumeHandle && size < p.Size {
		was := int64(0)
		if p != nil {
			was = p.Size
		}

		return &reasoned{v1alpha1.ReasonDeviceShort, false, fmt.Errorf(
			"the volume made from the snapshot has a device of %d bytes, the volume had %d when it was backed up last: the driver gave a volume that lacks its end", size, was)}
	}

	return nil
}

// Options of a backup that a task asks for, without its disk and its sources.
func Options(t *mover.BackupTask, version string) backup.Options {
	claim := t.Claim

	return backup.Options{
		Volume: t.Volume, Full: t.Full, Time: t.Time, Claim: &claim, VolumeHandle: t.Changed.Target.VolumeHandle,
		VerifyUnchanged: t.VerifyUnchanged, ToolVersion: version,
		// Nobody is there to be asked, and what keeps the old disk's points is the lineage.
		OtherDisk: backup.BeginLineage,
	}
}

// Make runs a backup by the ladder of the task's changed blocks and says what came of it.
// A claim of the same name on another volume begins with a full.
func Make(ctx context.Context, repo *repository.Repository, t *mover.BackupTask, opt backup.Options) (mover.Result, error) {
	session, err := csi.Open(ctx, t.Changed)
	if err != nil {
		return mover.Result{}, err
	}
	defer session.Close()
	if opt.Source == nil {
		opt.Source, opt.Fallback = session.Ladder()
		if opt.Full {
			opt.Source, opt.Fallback = session.Whole(), nil
		}
	}
	p, rec, err := backup.Run(ctx, repo, opt)
	if errors.Is(err, backup.ErrWrongParent) && !opt.Full {
		// The claim was deleted and made again: there is nothing to build on.
		opt.Full = true
		p, rec, err = backup.Run(ctx, repo, opt)
	}
	if err != nil {
		return mover.Result{}, err
	}

	return result(ctx, repo, t, p, rec)
}

// Done finds the point that an earlier attempt made of the same snapshot.
func Done(ctx context.Context, repo *repository.Repository, t *mover.BackupTask) (mover.Result, bool, error) {
	cat, err := backup.List(ctx, repo, backup.ListOptions{Volume: &t.Volume})
	if err != nil {
		return mover.Result{}, false, err
	}
	points := cat.Of(t.Volume)
	for _, p := range slices.Backward(points) {
		if p.SnapshotHandle == "" || p.SnapshotHandle != t.Changed.Target.Handle || p.VolumeHandle != t.Changed.Target.VolumeHandle {
			continue
		}
		rec, err := backup.LoadRecord(ctx, repo, p)
		if err != nil {
			return mover.Result{}, false, err
		}
		r, err := result(ctx, repo, t, p, rec)
		r.OK = err == nil

		return r, err == nil, err
	}

	return mover.Result{}, false, nil
}

// result summarises a point, after the retention of its volume was applied.
func result(ctx context.Context, repo *repository.Repository, t *mover.BackupTask, p *backup.Point, rec *blocktree.Record) (mover.Result, error) {
	r := mover.Result{Point: Summary(rec), SnapshotHandle: rec.SnapshotHandle, ChangeID: rec.ChangeID}
	if rec.Lineage == rec.ID {
		r.NewLineage = rec.LineageReason
	}
	if t.Retention != nil {
		plan, err := backup.Prune(ctx, repo, backup.PruneOptions{Policy: *t.Retention, Volumes: []backup.Volume{t.Volume}, Cluster: t.Volume.Cluster, NamespaceUID: t.NamespaceUID})
		if err != nil {
			// The point is made; the next run applies the retention again.
			r.KeepError = err.Error()
		} else {
			r.Removed, r.ByFloor = int64(len(plan.Removed())), int64(plan.ByFloor())
		}
	}
	var err error
	if r.Listed, r.PointCount, err = Newest(ctx, repo, p.Volume, t.NamespaceUID); err != nil {
		return mover.Result{}, err
	}

	return r, nil
}

// Summary of a point, as objects show it.
func Summary(rec *blocktree.Record) *v1alpha1.PointSummary {
	s := &v1alpha1.PointSummary{
		ID: rec.ID, Time: metav1.NewTime(rec.Time), Kind: rec.Kind, SizeBytes: rec.Size, Source: rec.Source,
		ReadBytes: rec.Stats.Read, StoredBytes: rec.Stats.Uploaded,
	}
	for _, f := range rec.Fallbacks {
		s.Fallbacks = append(s.Fallbacks, f.From+": "+f.Reason)
	}

	return s
}

// Newest points of a volume, newest first, at most v1alpha1.MaxListedPoints, and how many
// it has. With a namespaceUID only those that were made in that namespace are.
func Newest(ctx context.Context, repo *repository.Repository, v backup.Volume, namespaceUID string) ([]mover.ListedPoint, int64, error) {
	if err := repo.Refresh(ctx); err != nil {
		return nil, 0, err
	}
	cat, err := backup.List(ctx, repo, backup.ListOptions{Volume: &v})
	if err != nil {
		return nil, 0, err
	}
	points := cat.Of(v)
	if namespaceUID != "" {
		points = slices.DeleteFunc(points, func(p *backup.Point) bool { return p.NamespaceUID != namespaceUID })
	}
	var out []mover.ListedPoint
	for _, p := range slices.Backward(points) {
		if len(out) == v1alpha1.MaxListedPoints {
			break
		}
		out = append(out, mover.ListedPoint{ID: p.ID, Time: p.Time.UTC()})
	}

	return out, int64(len(points)), nil
}

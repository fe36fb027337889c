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
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

func makePoint(ctx context.Context, e Environment, t mover.Task, repo *store.Open) (res mover.Result, err error) {
	if done, ok, err := Done(ctx, repo.Repository, t.Backup); err != nil || ok {
		return done, err
	}
	session, err := openDevice(ctx, e.Device)
	if err != nil {
		return mover.Result{}, err
	}
	defer func() { err = errors.Join(err, session.Close()) }()
	src := session.Disks()[0].Bytes
	opt := Options(t.Backup, e.Version)
	opt.Disk, opt.Check = src, session.Check
	if err := checkLength(ctx, repo.Repository, t.Backup, src.Size()); err != nil {
		return mover.Result{}, err
	}
	if e.Probe != nil {
		// An unknown one is no error: a database may use the raw device.
		if fs, err := e.Probe(src, src.Size()); err == nil {
			opt.FileSystem = fs
		}
	}
	say := &reporter{w: e.Log}
	opt.Progress = func(p backup.Progress) { say.Tell(mover.Progress{Phase: p.Phase, Done: p.Done, Total: p.Total}) }

	if res, err = Make(ctx, repo.Repository, t.Backup, opt); err != nil {
		return mover.Result{}, err
	}
	return res, session.Commit(ctx)
}

// checkLength refuses a device that cannot be the whole volume: a volume never shrinks,
// so one shorter than its latest point is a driver's fault.
func checkLength(ctx context.Context, repo *repository.Repository, t *mover.BackupTask, size int64) error {
	cat, err := points.List(ctx, repo, points.ListOptions{Volume: &t.Volume})
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
			"the volume made from the snapshot has a device of %s, and the volume had %s at its last backup: the driver made a volume that lacks the end", bytesize.Exact(size), bytesize.Exact(was))}
	}
	return nil
}

// Options returns those of a task's backup, without its disk and its sources.
func Options(t *mover.BackupTask, version string) backup.Options {
	claim := t.Claim
	return backup.Options{
		Volume: t.Volume, Full: t.Full, Time: t.Time, Claim: &claim, VolumeHandle: t.Changed.Target.VolumeHandle,
		VerifyUnchanged: t.VerifyUnchanged, ToolVersion: version, Consistency: t.Consistency, Group: t.Group,
		// There is no user to ask, and the lineage keeps the old disk's points.
		OtherDisk: backup.BeginLineage,
	}
}

// Make runs a backup by the ladder of the task's changed blocks and returns the result. A
// claim of the same name on another volume begins with a full.
func Make(ctx context.Context, repo *repository.Repository, t *mover.BackupTask, opt backup.Options) (mover.Result, error) {
	changed := t.Changed
	changed.Log = repo.Log()
	session, err := csi.Open(ctx, changed)
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
		// The claim was deleted and created again: there is nothing to build on.
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
	cat, err := points.List(ctx, repo, points.ListOptions{Volume: &t.Volume})
	if err != nil {
		return mover.Result{}, false, err
	}
	pts := cat.Of(t.Volume)
	for _, p := range slices.Backward(pts) {
		if p.SnapshotHandle == "" || p.SnapshotHandle != t.Changed.Target.Handle || p.VolumeHandle != t.Changed.Target.VolumeHandle {
			continue
		}
		rec, err := points.LoadRecord(ctx, repo, p)
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
func result(ctx context.Context, repo *repository.Repository, t *mover.BackupTask, p *points.Point, rec *blocktree.Record) (mover.Result, error) {
	r := mover.Result{Point: Summary(rec), SnapshotHandle: rec.SnapshotHandle, ChangeID: rec.ChangeID}
	if rec.Lineage == rec.ID {
		r.NewLineage = rec.LineageReason
	}
	keep(ctx, repo, &r, t.Volume, t.Retention, t.NamespaceUID, t.Group != nil)
	var err error
	if r.Listed, r.PointCount, err = Newest(ctx, repo, p.Volume, t.NamespaceUID); err != nil {
		return mover.Result{}, err
	}
	return r, nil
}

// keep applies a volume's retention, if any, and records the outcome in a result.
func keep(ctx context.Context, repo *repository.Repository, r *mover.Result, v points.Volume, retention *backup.Policy, namespaceUID string, group bool) {
	if retention == nil {
		return
	}
	plan, err := backup.Prune(ctx, repo, backup.PruneOptions{
		Policy: *retention, Volumes: []points.Volume{v}, Cluster: v.Cluster, NamespaceUID: namespaceUID,
		// A group is deleted as one, and none of its runs covers all its volumes.
		WithGroups: group,
	})
	if err != nil {
		// The point is made; the next run applies the retention again.
		r.KeepError = err.Error()
		return
	}
	r.Removed, r.ByFloor = int64(len(plan.Removed())), int64(plan.ByFloor())
}

// Summary returns a point's summary, as objects show it.
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

// Newest returns the points of a volume, newest first, at most v1alpha1.MaxListedPoints,
// and how many it has. With a namespaceUID only points made in that namespace count.
func Newest(ctx context.Context, repo *repository.Repository, v points.Volume, namespaceUID string) ([]mover.ListedPoint, int64, error) {
	if err := repo.Refresh(ctx); err != nil {
		return nil, 0, err
	}
	cat, err := points.List(ctx, repo, points.ListOptions{Volume: &v})
	if err != nil {
		return nil, 0, err
	}
	pts := cat.Of(v)
	if namespaceUID != "" {
		pts = slices.DeleteFunc(pts, func(p *points.Point) bool { return p.NamespaceUID != namespaceUID })
	}
	var out []mover.ListedPoint
	for _, p := range slices.Backward(pts) {
		if len(out) == v1alpha1.MaxListedPoints {
			break
		}
		out = append(out, mover.ListedPoint{ID: p.ID, Time: p.Time.UTC()})
	}
	return out, int64(len(pts)), nil
}

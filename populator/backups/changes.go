package backups

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/csi"
	"github.com/varve-io/varve/backup/cbt/csi/csikube"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/mover/work"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
)

// askPatience bounds the check whether anything changed: if the storage takes longer, the
// mover, which has the time, repeats it.
const askPatience = time.Minute

// lookTimeout bounds all calls to a repository here: a storage that accepts requests and
// answers none must not block a worker. The mover calls it again.
const lookTimeout = 5 * time.Minute

// task returns the mover's task. It is made for each attempt from the cluster's state
// then.
func (r *run) task(ctx context.Context) (*mover.BackupTask, error) {
	s := &r.vb.Status
	st, err := r.store(ctx)
	if err != nil {
		return nil, r.refuse(err)
	}
	target, driver, err := csikube.Snapshot(ctx, r.Live, types.NamespacedName{Namespace: r.Pods.Namespace, Name: twinName(r.vb.UID)}, s.VolumeHandle)
	if apierrors.IsNotFound(err) {
		return nil, step.Terminal(v1alpha1.ReasonSnapshotGone, fmt.Errorf("it was deleted: %w", err))
	}
	if err != nil {
		return nil, err
	}
	endpoint, err := csikube.Service(ctx, r.Live, driver)
	if err != nil {
		return nil, err
	}
	t := &mover.BackupTask{
		Volume: st.Volume(r.vb.Namespace, r.vb.Spec.ClaimName), Full: r.vb.Spec.Type == v1alpha1.BackupTypeFull,
		Time: s.SnapshotTime.Time, VerifyUnchanged: r.VerifyUnchanged,
		Claim: blocktree.Claim{
			UID: string(s.ClaimUID), NamespaceUID: string(s.NamespaceUID), VolumeMode: string(s.Claim.VolumeMode), RequestBytes: s.Claim.RequestBytes,
			Capacity: s.Claim.CapacityBytes, StorageClass: s.Claim.StorageClassName, Driver: s.Driver,
		},
		Changed:     csi.Options{Endpoint: endpoint, TokenFile: mover.TokenFile, Target: target},
		Consistency: r.consistency(), Group: r.group(st),
	}
	for _, m := range s.Claim.AccessModes {
		t.Claim.AccessModes = append(t.Claim.AccessModes, string(m))
	}
	if endpoint.Address == "" {
		t.Changed.TokenFile = ""
	}
	if t.Retention, err = r.retention(ctx); err != nil {
		return nil, err
	}
	if st.ByUID() {
		t.NamespaceUID = string(s.NamespaceUID)
		if t.NamespaceUID == "" { // an earlier version began the run, and the owner of the points is not known
			t.Retention = nil
		}
	}
	pv, err := r.protectedVolume(ctx)
	if err != nil {
		return nil, err
	}
	if pv != nil && pv.Status.Base != nil && pv.Status.ClaimUID == s.ClaimUID {
		b := pv.Status.Base
		t.Changed.Base = &csi.Snapshot{Namespace: r.Pods.Namespace, Name: b.Name, Handle: b.Handle, ChangeID: b.ChangeID, VolumeHandle: s.VolumeHandle}
	}
	return t, nil
}

// retention returns the one to apply once the point exists; nil for none. For a claim that
// names a recovery point but got a volume that Varve did not fill, nothing is deleted: the
// volume may be empty, and its backups would replace the points with the data. The store's
// floor is included.
func (r *run) retention(ctx context.Context) (*backup.Policy, error) {
	p, err := Policy(r.vb.Spec.Retention)
	if err != nil {
		return nil, step.Terminal(v1alpha1.ReasonInvalidSpec, err)
	}
	if p != nil {
		st, err := r.store(ctx)
		if err != nil {
			return nil, r.refuse(err)
		}
		p.Floor = st.Floor()
	}
	pvc, err := r.claim(ctx)
	if p == nil || err != nil || !claims.Means(pvc) {
		return p, client.IgnoreNotFound(err)
	}
	var pv corev1.PersistentVolume
	if err := r.Live.Get(ctx, types.NamespacedName{Name: pvc.Spec.VolumeName}, &pv); err != nil {
		return nil, fmt.Errorf("read volume %s of claim %s: %w", pvc.Spec.VolumeName, pvc.Name, err)
	}
	if pv.Annotations[claims.AnnotationPopulatedFrom] != "" {
		return p, nil
	}
	r.Events.Warning(r.vb, v1alpha1.ReasonBoundWithoutUs,
		"retention is not applied: claim %s names a recovery point, or was applied with one, and was bound to volume %s, which Varve did not fill, so that it may be empty; if its data is right: kubectl annotate pv %s %s=checked",
		pvc.Name, pv.Name, pv.Name, claims.AnnotationPopulatedFrom)
	return nil, nil
}

// Policy returns a Retention as package backup applies it; nil for none.
func Policy(r *v1alpha1.Retention) (*backup.Policy, error) {
	if r == nil {
		return nil, nil
	}
	p := &backup.Policy{
		Latest: int(r.Latest), Hourly: int(r.Hourly), Daily: int(r.Daily), Weekly: int(r.Weekly), Monthly: int(r.Monthly), Yearly: int(r.Yearly),
	}
	if r.Within != nil {
		p.Within = r.Within.Duration
	}
	if err := p.Check(); err != nil {
		return nil, fmt.Errorf("retention: %w", err)
	}
	return p, nil
}

// askChanges checks, before any volume is made from the snapshot, whether an earlier attempt
// has made the point, and whether anything changed at all: if not, it writes the point.
func (r *run) askChanges(ctx context.Context) (step.Result, error) {
	if r.vb.Status.Point != nil {
		return step.Done(), nil
	}
	t, err := r.task(ctx)
	if errors.Is(err, csikube.ErrNotReady) {
		if r.waited() > placeGrace {
			return step.Done(), nil // the mover will ask
		}
		return step.Wait(v1alpha1.ReasonRunning, err.Error(), time.Second), nil
	}
	if err != nil {
		return step.Result{}, err
	}
	st, err := r.store(ctx)
	if err != nil {
		return step.Result{}, r.refuse(err)
	}
	var res mover.Result
	look, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	err = r.Stores.With(look, st, func(look context.Context, repo *store.Open) error {
		var found bool
		if res, found, err = work.Done(look, repo.Repository, t); err != nil || found {
			return err
		}
		res, err = r.unchanged(look, repo, t)
		if res.KeepError != "" {
			res.KeepError = repo.Redact(errors.New(res.KeepError)).Error()
		}
		return err
	})
	if err != nil && look.Err() != nil && ctx.Err() == nil {
		r.log().InfoContext(ctx, "the storage does not answer in time; the mover will ask it", "run", r.vb.Namespace+"/"+r.vb.Name, "after", lookTimeout, "error", err)
		return step.Done(), nil
	}
	if err != nil {
		return step.Result{}, err
	}
	if res.OK {
		return step.Done(), r.succeed(ctx, res)
	}
	return step.Done(), nil
}

// unchanged makes the point if the storage reports that nothing changed since the parent. A
// failed call is no failure of the run: the mover repeats it and falls back with a reason.
func (r *run) unchanged(ctx context.Context, repo *store.Open, t *mover.BackupTask) (mover.Result, error) {
	none := mover.Result{}
	if t.Full || t.Changed.Endpoint.Address == "" || t.Changed.Endpoint.Trouble != "" || t.Changed.Base == nil || r.Tokens == nil {
		return none, nil
	}
	cat, err := points.List(ctx, repo.Repository, points.ListOptions{Volume: &t.Volume})
	if err != nil {
		return none, err
	}
	if pv, err := r.protectedVolume(ctx); err != nil || pv == nil || unreadInARow(pv.Status.Points) >= maxUnread {
		return none, err
	}
	parent := cat.Latest(t.Volume)
	if parent == nil || parent.ChangeID == "" || parent.VolumeHandle != t.Changed.Target.VolumeHandle {
		return none, nil
	}
	rec, err := points.LoadRecord(ctx, repo.Repository, parent)
	if err != nil {
		return none, err
	}
	if rec.Claim == nil || rec.Claim.Capacity != t.Claim.Capacity {
		return none, nil // it grew: only the device shows its size
	}
	opt := *t
	opt.Changed.TokenFile, opt.Changed.Tokens = "", r.Tokens(t.Changed.Endpoint.Audience)
	opt.Changed.Retry.Attempts = 2
	session, err := csi.Open(ctx, opt.Changed)
	if err != nil {
		return none, err
	}
	defer session.Close()
	ask, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	same, err := session.Unchanged(ask, cbt.Base{
		PointID: parent.ID, ChangeID: parent.ChangeID, SnapshotHandle: parent.SnapshotHandle, VolumeHandle: parent.VolumeHandle, Size: parent.Size,
	})
	if err != nil || !same {
		if err != nil && ctx.Err() == nil {
			r.log().InfoContext(ctx, "cannot ask here whether anything changed; the mover will", "run", r.vb.Namespace+"/"+r.vb.Name, "error", err)
		}
		return none, ctx.Err()
	}
	o := work.Options(&opt, r.Version)
	o.Disk, o.Parent, o.VerifyUnchanged, o.FileSystem = unread(parent.Size), parent.ID, 0, rec.FileSystem
	o.Source = session.Delta()
	res, err := work.Make(ctx, repo.Repository, &opt, o)
	if errors.Is(err, errUnread) || err != nil && ctx.Err() == nil {
		r.log().InfoContext(ctx, "an empty delta did not make a point; the mover will", "run", r.vb.Namespace+"/"+r.vb.Name, "error", repo.Redact(err))
		return none, nil
	}
	res.OK = err == nil
	return res, err
}

// maxUnread is how many points in a row may be made without reading anything. Nothing is
// spot-checked then, and a driver that never reports a change would not be detected.
const maxUnread = 7

// unreadInARow counts the newest points made without reading.
func unreadInARow(pts []v1alpha1.PointSummary) int {
	n := slices.IndexFunc(pts, func(p v1alpha1.PointSummary) bool { return p.Source != csi.DeltaName || p.ReadBytes > 0 })
	if n < 0 {
		return len(pts)
	}
	return n
}

// unread is a disk of this size that must not be read: nothing of it changed.
type unread int64

var errUnread = errors.New("a disk of which nothing changed was to be read")

func (unread) ReadAt([]byte, int64) (int, error) { return 0, errUnread }
func (u unread) Size() int64                     { return int64(u) }
func (unread) CheckSize() error                  { return nil }

package backups

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/unbound"
)

// slowDriver makes a volume for the clone's claim only in the sixth call, and its provisioner,
// which is killed between any two calls, calls it for existing claims.
type slowDriver struct {
	l     *line
	list  map[types.UID]string // the driver's volumes, by the claims that requested them
	calls int
}

func (d *slowDriver) claims() []corev1.PersistentVolumeClaim {
	var all corev1.PersistentVolumeClaimList
	if err := d.l.c.List(d.l.t.Context(), &all, client.InNamespace("varve")); err != nil {
		d.l.t.Fatal(err)
	}
	return all.Items
}

func (d *slowDriver) must(err error) {
	d.l.t.Helper()
	if err != nil {
		d.l.t.Fatal(err)
	}
}

// turn is a call of the driver, and the cluster's work on volumes and claims.
func (d *slowDriver) turn() {
	ctx := d.l.t.Context()
	for _, c := range d.claims() {
		if c.Spec.VolumeName != "" {
			continue
		}
		d.list[c.UID] = "vol-" + string(c.UID)
		if d.calls++; d.calls < 6 {
			d.must(d.l.c.Create(ctx, &corev1.Event{
				ObjectMeta:     metav1.ObjectMeta{Namespace: "varve", Name: fmt.Sprint("call-", d.calls)},
				InvolvedObject: corev1.ObjectReference{UID: c.UID}, Reason: unbound.ReasonFailed, LastTimestamp: metav1.NewTime(d.l.now),
				Message: "failed to provision volume: rpc error: code = DeadlineExceeded desc = late",
			}))

			continue
		}
		d.must(d.l.c.Create(ctx, &corev1.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: "made", Annotations: map[string]string{provisionedBy: "csi"}},
			Spec: corev1.PersistentVolumeSpec{
				PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain, // the class retains
				ClaimRef:                      &corev1.ObjectReference{Namespace: "varve", Name: c.Name, UID: c.UID},
			},
			Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeBound},
		}))
		c.Spec.VolumeName = "made"
		d.must(d.l.c.Update(ctx, &c))
	}
	var pv corev1.PersistentVolume
	err := d.l.c.Get(ctx, client.ObjectKey{Name: "made"}, &pv)
	if err != nil || len(d.claims()) > 0 || pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimRetain {
		d.must(client.IgnoreNotFound(err))
		return
	}
	delete(d.list, pv.Spec.ClaimRef.UID)
	d.must(d.l.c.Delete(ctx, &pv))
}

// check requires that an object names each of the driver's volumes.
func (d *slowDriver) check() {
	d.l.t.Helper()
	for uid, handle := range d.list {
		var pv corev1.PersistentVolume
		known := d.l.c.Get(d.l.t.Context(), client.ObjectKey{Name: "made"}, &pv) == nil && pv.Spec.ClaimRef.UID == uid
		for _, c := range d.claims() {
			known = known || c.UID == uid
		}
		if !known {
			d.l.t.Fatalf("no object of the cluster knows of %s any more", handle)
		}
	}
}

// abandoned fails a run while its clone is being made, since its storage is unreachable, and
// deletes it after so many turns. The controller is killed at one of its writes.
func abandoned(t *testing.T, turns, killAt int) (writes int) {
	t.Helper()
	vb := newRun("run", "AbandonClone")
	vb.UID = testUID
	vb.Status.Clones, vb.Status.Attempts = 1, 1
	meta.SetStatusCondition(&vb.Status.Conditions, metav1.Condition{
		Type: v1alpha1.ConditionFailed, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonRepositoryUnreachable, Message: "connection refused"})
	name := cloneName(vb.UID, 1)
	class := "fast"
	claim := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "varve", Name: name, UID: "clone", Labels: mover.RunLabels(Role, vb.UID),
			Annotations: map[string]string{mover.AnnotationOwner: "VolumeBackup/shop/run", unbound.AnnProvisioner: "csi"},
		},
		Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: &class},
	}
	l := newLine(t, vb, claim)
	d := &slowDriver{l: l, list: map[types.UID]string{"clone": "vol-clone"}}
	killed := errors.New("killed")
	dead := false
	l.b.Client = step.Observe(l.c, func(context.Context, step.Write) error {
		if writes++; writes-1 == killAt || dead {
			dead = true
			return killed
		}
		return nil
	})
	for turn := range 40 {
		if turn == turns {
			d.must(client.IgnoreNotFound(l.c.Delete(t.Context(), newRun("run", ""))))
		}
		if turn < turns {
			l.look("run")
		}
		d.check()
		left, err := NewLeftovers(l.b).Sweep(t.Context())
		if err != nil && !errors.Is(err, killed) {
			t.Fatal(err)
		}
		if turn > turns && err == nil && len(d.list) > 0 && left == 0 {
			t.Fatalf("the driver lists %v, and nothing is said to be left", d.list)
		}
		d.check()
		if dead { // another process
			l.b = &Reconciler{Client: l.c, Live: l.b.Live, Pods: l.b.Pods, Queue: l.b.Queue, Events: l.b.Events, Stores: l.b.Stores, Now: l.b.Now}
			dead = false
		}
		d.turn()
		d.check()
		l.now = l.now.Add(30 * time.Second)
		if len(d.list) == 0 && len(d.claims()) == 0 && turn > turns {
			return writes
		}
	}
	t.Fatalf("the driver lists %v, and there are claims: %v", d.list, d.claims())
	return writes
}

// After a kill at any time, the driver has no volume that no object of the cluster names.
func TestNoVolumeIsLostByFaultsTogether(t *testing.T) {
	for _, turns := range []int{0, 1, 4, 8, 30} {
		for at := range abandoned(t, turns, -1) {
			t.Run(fmt.Sprintf("deleted at turn %d, killed at write %d", turns, at), func(t *testing.T) { abandoned(t, turns, at) })
		}
	}
}

package replace

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Kept expires PersistentVolumes that keep an old storage volume: it sets the policy that they
// had under their claim, so with Delete the storage deletes them. The requesting object need
// not exist any more.
type Kept struct{ *Reconciler }

// Reconcile checks one PersistentVolume.
func (k *Kept) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	pv, err := k.volume(ctx, req.Name)
	if err != nil || pv == nil || pv.DeletionTimestamp != nil || pv.Labels[LabelKept] == "" || pv.Annotations[AnnotationKeepUntil] == "" {
		return ctrl.Result{}, err
	}
	// A volume that a user bound to a claim is the user's.
	if ref := pv.Spec.ClaimRef; ref == nil || ref.Namespace != k.Namespace || ref.Name != pv.Name {
		return ctrl.Result{}, nil
	}
	until, err := time.Parse(time.RFC3339, pv.Annotations[AnnotationKeepUntil])
	if err != nil {
		return ctrl.Result{}, nil //nolint:nilerr // set by hand: it is kept
	}
	if wait := until.Sub(k.Now()); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	taken, err := k.taken(ctx, pv)
	if err != nil || taken {
		return ctrl.Result{RequeueAfter: time.Minute}, err
	}
	policy := corev1.PersistentVolumeReclaimPolicy(pv.Annotations[AnnotationKeptPolicy])
	if policy != corev1.PersistentVolumeReclaimDelete || pv.Spec.PersistentVolumeReclaimPolicy == policy {
		return ctrl.Result{}, nil
	}
	err = k.patchVolume(ctx, pv, func(pv *corev1.PersistentVolume) { pv.Spec.PersistentVolumeReclaimPolicy = policy })
	if apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: look}, nil
	}
	return ctrl.Result{}, err
}

// taken reports whether a storage volume is also on another PersistentVolume, or is being given
// to a claim.
func (k *Kept) taken(ctx context.Context, pv *corev1.PersistentVolume) (bool, error) {
	names, err := Others(ctx, k.Live, pv)
	if err != nil || len(names) > 0 {
		return len(names) > 0, err
	}
	by, err := Giving(ctx, k.Live, k.Namespace, pv.Name)
	return by != "", err
}

// Others names the other PersistentVolumes with the same storage volume. r must read past
// any cache.
func Others(ctx context.Context, r client.Reader, pv *corev1.PersistentVolume) ([]string, error) {
	var list corev1.PersistentVolumeList
	if err := r.List(ctx, &list); err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var names []string
	for i := range list.Items {
		if o := &list.Items[i]; o.Name != pv.Name && handle(o) != "" && handle(o) == handle(pv) {
			names = append(names, o.Name)
		}
	}
	return names, nil
}

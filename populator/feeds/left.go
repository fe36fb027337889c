package feeds

import (
	"context"
	"errors"
	"fmt"
	"strings"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
)

// Sweep removes the movers of DumpRestores that have ended or are gone, and returns how many there were. The
// finalizer keeps a DumpRestore until its movers were removed, but a person may remove it by hand: then the
// command is ended here, by its stream.
func (r *Reconciler) Sweep(ctx context.Context) (int, error) {
	var jobs batchv1.JobList
	var all v1alpha1.DumpRestoreList
	// In this order: a DumpRestore exists before its mover.
	err := r.Live.List(ctx, &jobs, client.InNamespace(r.Pods.Namespace), client.MatchingLabels{mover.LabelManagedBy: mover.ManagedBy, mover.LabelRole: Role})
	if err == nil && len(jobs.Items) > 0 {
		err = r.Live.List(ctx, &all)
	}
	if err != nil {
		return 0, fmt.Errorf("list movers of DumpRestores: %w", err)
	}
	alive := map[types.UID]bool{}
	for i := range all.Items {
		if dr := &all.Items[i]; dr.DeletionTimestamp == nil && dr.Status.CompletionTime == nil {
			alive[dr.UID] = true
		}
	}
	left := 0
	var errs []error
	for i := range jobs.Items {
		j := &jobs.Items[i]
		uid, owner := types.UID(j.Labels[mover.LabelRun]), j.Annotations[mover.AnnotationOwner]
		if uid == "" || !strings.HasPrefix(owner, "DumpRestore/") {
			r.log().WarnContext(ctx, "a mover of a DumpRestore does not say of which; it is left alone", "job", j.Name, "owner", owner)
			continue
		}
		if alive[uid] {
			continue
		}
		left++
		r.Streams.Drop(uid)
		r.Queue.Done(uid)
		// A mover of a BackupStore has no Secret of its own.
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: r.Pods.Namespace, Name: secretName(uid)}}
		errs = append(errs, client.IgnoreNotFound(r.Client.Delete(ctx, secret)))
		if j.DeletionTimestamp == nil {
			errs = append(errs, client.IgnoreNotFound(r.Client.Delete(ctx, j, client.PropagationPolicy(metav1.DeletePropagationBackground))))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return left, fmt.Errorf("remove movers of DumpRestores: %w", err)
	}
	return left, nil
}

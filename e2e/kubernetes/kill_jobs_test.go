package kubernetes

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
	"github.com/varve-io/varve/populator/claims"
	"github.com/varve-io/varve/populator/replace"
)

// job is work for the controller, and how to detect its end.
type job struct {
	start func()
	ended func(context.Context) error
}

// backupJob is a backup of claim data, by delta, which must end in a phase. The volume that is
// read has a class that would keep it.
func (k *killer) backupJob(name string, want v1alpha1.BackupPhase) job {
	return job{func() {
		k.startBackup(name, "data", func(vb *v1alpha1.VolumeBackup) {
			vb.Spec.BackupVolume = &v1alpha1.BackupVolume{StorageClassName: k.retaining}
		})
	}, func(ctx context.Context) error {
		var vb v1alpha1.VolumeBackup
		if err := k.Client.Get(ctx, k.Key(name), &vb); err != nil {
			return err
		}
		if vb.Status.Phase != want || vb.Status.CompletionTime == nil {
			return fmt.Errorf("backup is %s at %s: %s", vb.Status.Phase, vb.Status.Step, says(vb.Status.Conditions))
		}
		return nil
	}}
}

// restoreJob is a claim to fill: one in Block mode gets the written volume, one in
// Filesystem mode another one, by the swap.
func (s *site) restoreJob(c framework.Claim, source string) job {
	return job{func() { s.restoreClaim(restored{Claim: c, Source: source}) }, func(ctx context.Context) error {
		var pvc corev1.PersistentVolumeClaim
		if err := s.Client.Get(ctx, s.Key(c.Name), &pvc); err != nil {
			return err
		}
		if pvc.Status.Phase != corev1.ClaimBound || len(pvc.Finalizers) != 1 {
			return s.NotYet(c.Name, "claim %s is %s with %v", c.Name, pvc.Status.Phase, pvc.Finalizers)
		}
		return s.nothingAt(ctx, pvc.UID)
	}}
}

// nothingAt returns nil if no VolumePopulation concerns a claim.
func (s *site) nothingAt(ctx context.Context, claim types.UID) error {
	var pop v1alpha1.VolumePopulation
	err := s.Client.Get(ctx, client.ObjectKey{Namespace: varveNamespace, Name: claims.PopulationName(claim)}, &pop)
	if err == nil {
		return fmt.Errorf("there is a VolumePopulation at %q", pop.Status.Step)
	}
	return client.IgnoreNotFound(err)
}

// deletedJob is a claim that is deleted while its volume is being made.
func (s *site) deletedJob(c framework.Claim, source string) job {
	var pvc *corev1.PersistentVolumeClaim
	deleted := false
	return job{func() { pvc = s.restoreClaim(restored{Claim: c, Source: source}) }, func(ctx context.Context) error {
		if !deleted {
			prime := client.ObjectKey{Namespace: varveNamespace, Name: claims.PrimePrefix + string(pvc.UID)}
			if err := s.Client.Get(ctx, prime, &corev1.PersistentVolumeClaim{}); err != nil {
				return err
			}
			if err := s.Client.Delete(ctx, pvc); err != nil {
				return err
			}
			deleted = true
		}
		if err := s.Client.Get(ctx, s.Key(c.Name), &corev1.PersistentVolumeClaim{}); err == nil {
			return fmt.Errorf("claim %s is still there", c.Name)
		} else if client.IgnoreNotFound(err) != nil {
			return err
		}
		return s.nothingAt(ctx, pvc.UID)
	}}
}

// rollBackJob is a claim that is rolled back and forward again, or whose restore is called off
// while its volume is written.
func (s *site) rollBackJob(name string, off bool) job {
	asked := false
	undo := func(ctx context.Context) error {
		patch := client.RawPatch(types.MergePatchType, []byte(`{"spec":{"undo":true}}`))
		asked = true
		return s.Client.Patch(ctx, &v1alpha1.VolumeRestore{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name}}, patch)
	}
	return job{func() {
		s.rollBack(name, "roll", func(vr *v1alpha1.VolumeRestore) {
			// It must not expire before the undo, however many kills and however slow a machine are in between; dropKept ends it.
			vr.Spec.From.Volume, vr.Spec.KeepOld = "data", &metav1.Duration{Duration: time.Hour}
		})
	}, func(ctx context.Context) error {
		var vr v1alpha1.VolumeRestore
		if err := s.Client.Get(ctx, s.Key(name), &vr); err != nil {
			return err
		}
		populations := s.nothingAt(ctx, vr.UID)
		if !asked && (off && populations != nil || !off && vr.Status.Phase == v1alpha1.RestoreSucceeded) {
			if err := undo(ctx); err != nil {
				return err
			}
		}
		if vr.Status.Phase != v1alpha1.RestoreUndone || vr.Status.Step != "" || len(vr.Finalizers) > 0 || populations != nil {
			return fmt.Errorf("restore is %s at %s: %s", vr.Status.Phase, vr.Status.Step, says(vr.Status.Conditions))
		}
		return s.dropKept(ctx, string(vr.UID))
	}}
}

// dropKept makes what a restore kept expire now.
func (s *site) dropKept(ctx context.Context, uid string) error {
	var list corev1.PersistentVolumeList
	if err := s.Client.List(ctx, &list, client.HasLabels{replace.LabelKept}); err != nil {
		return err
	}
	for i := range list.Items {
		pv := &list.Items[i]
		if !strings.HasSuffix(pv.Name, uid) {
			continue
		}
		patch := client.RawPatch(types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%q}}}`, replace.AnnotationKeepUntil, time.Now().UTC().Format(time.RFC3339)))
		if err := s.Client.Patch(ctx, pv, patch); client.IgnoreNotFound(err) != nil {
			return err
		}
		return fmt.Errorf("volume %s is kept", pv.Name)
	}
	return nil
}

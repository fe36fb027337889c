package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

// startBackup requests a backup to the main store.
func (s *site) startBackup(name, claim string, change func(*v1alpha1.VolumeBackup)) *v1alpha1.VolumeBackup {
	s.T.Helper()
	vb := &v1alpha1.VolumeBackup{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name},
		Spec: v1alpha1.VolumeBackupSpec{ClaimName: claim, StoreRef: v1alpha1.StoreReference{Name: mainStore}}}
	if change != nil {
		change(vb)
	}
	s.Create(vb)
	return vb
}

// backup requests a backup and waits until it succeeded.
func (s *site) backup(name, claim string, change func(*v1alpha1.VolumeBackup)) *v1alpha1.VolumeBackup {
	s.T.Helper()
	s.startBackup(name, claim, change)
	return s.waitBackup(name)
}

// waitBackup waits until a backup succeeded, and ends the test if it failed.
func (s *site) waitBackup(name string) *v1alpha1.VolumeBackup {
	s.T.Helper()
	vb := s.waitEnd(name)
	if err := ready(vb.Status.Conditions, v1alpha1.ConditionComplete); err != nil || vb.Status.Phase != v1alpha1.BackupSucceeded || vb.Status.Point == nil {
		s.T.Fatalf("backup %s ended %s: %v; %+v", name, vb.Status.Phase, err, vb.Status)
	}
	return vb
}

// waitEnd waits until a backup succeeded or failed.
func (s *site) waitEnd(name string) *v1alpha1.VolumeBackup {
	s.T.Helper()
	vb := &v1alpha1.VolumeBackup{}
	s.Eventually("backup "+name, func(ctx context.Context) error {
		if err := s.Client.Get(ctx, s.Key(name), vb); err != nil {
			return err
		}
		switch vb.Status.Phase {
		case v1alpha1.BackupSucceeded, v1alpha1.BackupFailed:
			return nil
		}
		return fmt.Errorf("it is %q at step %q: %s", vb.Status.Phase, vb.Status.Step, says(vb.Status.Conditions))
	})
	return vb
}

// waitFailed waits until a backup failed for a reason.
func (s *site) waitFailed(name, reason string) *v1alpha1.VolumeBackup {
	s.T.Helper()
	vb := s.waitEnd(name)
	c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed)
	if vb.Status.Phase != v1alpha1.BackupFailed || c == nil || c.Status != metav1.ConditionTrue || c.Reason != reason {
		s.T.Fatalf("backup %s is %s: %s; want it to fail for %s", name, vb.Status.Phase, says(vb.Status.Conditions), reason)
	}
	return vb
}

func says(conditions []metav1.Condition) string {
	var b strings.Builder
	for _, c := range conditions {
		fmt.Fprintf(&b, "%s is %s: %s: %s; ", c.Type, c.Status, c.Reason, c.Message)
	}
	return b.String()
}

// source makes a RecoverySource of a volume in the main store.
func (s *site) source(name string, change func(*v1alpha1.RecoverySource)) {
	s.T.Helper()
	rs := &v1alpha1.RecoverySource{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name},
		Spec: v1alpha1.RecoverySourceSpec{StoreRef: v1alpha1.StoreReference{Name: mainStore}}}
	if change != nil {
		change(rs)
	}
	s.Create(rs)
}

// restored describes a claim that is filled by Varve.
type restored struct {
	framework.Claim
	// Kind and Source named by dataSourceRef; a RecoverySource unless set.
	Kind, Source string
	// Namespace in dataSourceRef, which users should not write.
	Namespace string
}

// restoreClaim makes a claim that names the source of its data.
func (s *site) restoreClaim(r restored) *corev1.PersistentVolumeClaim {
	s.T.Helper()
	group := v1alpha1.GroupVersion.Group
	if r.Kind == "" {
		r.Kind = "RecoverySource"
	}
	pvc := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.F.Namespace, Name: r.Name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes:   []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			VolumeMode:    &r.Mode,
			DataSourceRef: &corev1.TypedObjectReference{APIGroup: &group, Kind: r.Kind, Name: r.Source},
			Resources:     corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(r.Size)}},
		}}
	if r.Class != "" {
		pvc.Spec.StorageClassName = &r.Class
	}
	if r.Namespace != "" {
		pvc.Spec.DataSourceRef.Namespace = &r.Namespace
	}
	s.Create(pvc)
	return pvc
}

// events returns the events about an object in the test's namespace, as lines of "Reason: message".
func (s *site) events(ctx context.Context, name string) (string, error) {
	var list corev1.EventList
	if err := s.Client.List(ctx, &list, inNamespace(s)); err != nil {
		return "", err
	}
	var b strings.Builder
	for _, e := range list.Items {
		if e.InvolvedObject.Name == name {
			fmt.Fprintf(&b, "%s: %s\n", e.Reason, e.Message)
		}
	}
	return b.String(), nil
}

// waitEvent waits for an event about an object with a reason.
func (s *site) waitEvent(name, reason string) string {
	s.T.Helper()
	return s.waitSaid(name, reason, "")
}

// waitSaid waits for an event about an object with a reason and a text in its message.
func (s *site) waitSaid(name, reason, part string) string {
	s.T.Helper()
	var found string
	s.Eventually("an event "+reason+" about "+name, func(ctx context.Context) error {
		all, err := s.events(ctx, name)
		if err != nil {
			return err
		}
		for line := range strings.Lines(all) {
			if strings.HasPrefix(line, reason+": ") && strings.Contains(line, part) {
				found = line
				return nil
			}
		}
		return errors.New("there are only:\n" + all)
	})
	return found
}

// pending fails the test if a claim is bound.
func (s *site) pending(name string) {
	s.T.Helper()
	var pvc corev1.PersistentVolumeClaim
	if err := s.Client.Get(s.T.Context(), s.Key(name), &pvc); err != nil {
		s.T.Fatal(err)
	}
	if pvc.Status.Phase != corev1.ClaimPending || pvc.Spec.VolumeName != "" {
		s.T.Fatalf("claim %s is %s to %q", name, pvc.Status.Phase, pvc.Spec.VolumeName)
	}
}

// blockPod runs a pod that has Block claims as /dev/NAME.
func (s *site) blockPod(name string, claims ...string) {
	s.T.Helper()
	modes := map[string]corev1.PersistentVolumeMode{}
	for _, c := range claims {
		modes[c] = framework.Block
	}
	s.RunPod(framework.Pod{Name: name, Claims: modes})
}

// deletePod deletes a pod and waits for its end.
func (s *site) deletePod(name string) {
	s.T.Helper()
	s.Delete(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name}})
}

// deleteClaim deletes a claim and waits for its end.
func (s *site) deleteClaim(name string) {
	s.T.Helper()
	s.Delete(&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name}})
}

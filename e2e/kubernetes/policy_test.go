package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

// A policy backs up what it selects, takes a full backup when the last is too old, and
// deletes old points; its user sees when the next run is.
func TestPolicy(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for name, labels := range map[string]map[string]string{"data": {"keep": "yes"}, "scratch": {"keep": "yes", v1alpha1.OptOutLabel: "true"}, "other": nil} {
		pvc := s.CreateClaim(framework.Claim{Name: name, Mode: framework.Block, Size: "16Mi"})
		old := pvc.DeepCopy()
		pvc.Labels = labels
		if err := s.Client.Patch(t.Context(), pvc, client.MergeFrom(old)); err != nil {
			t.Fatal(err)
		}
		s.WaitBound(name)
	}
	first := s.backup("first", "data", nil).Status.Point
	if p := s.backup("second", "data", nil).Status.Point; first.Kind != "full" || p.Kind != "incremental" {
		t.Errorf("by hand a %s and a %s point were made", first.Kind, p.Kind)
	}
	s.Create(&v1alpha1.BackupPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "minutely"}, Spec: v1alpha1.BackupPolicySpec{
		StoreRef: v1alpha1.StoreReference{Name: mainStore}, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"keep": "yes"}},
		Schedule: v1alpha1.Schedule{Cron: "* * * * *"}, Retention: &v1alpha1.Retention{Latest: 2},
		FullEvery: &metav1.Duration{Duration: time.Millisecond},
	}})
	var pv v1alpha1.ProtectedVolume
	s.Eventually("the policy's run and its retention", func(ctx context.Context) error {
		var runs v1alpha1.VolumeBackupList
		if err := s.Client.List(ctx, &runs, inNamespace(s)); err != nil {
			return err
		}
		var said []string
		for _, r := range runs.Items {
			said = append(said, fmt.Sprintf("%s of %s is %s", r.Name, r.Spec.ClaimName, r.Status.Phase))
			if r.Spec.ClaimName != "data" {
				t.Errorf("%s is of claim %s, which the policy leaves out", r.Name, r.Spec.ClaimName)
			}
			if r.Labels["varve.io/policy"] == "minutely" && r.Status.Point != nil && r.Status.Point.Kind != "full" {
				t.Errorf("the policy made an %s point, and the last full one was too old", r.Status.Point.Kind)
			}
		}
		var list v1alpha1.ProtectedVolumeList
		if err := s.Client.List(ctx, &list, inNamespace(s)); err != nil {
			return err
		}
		if len(list.Items) != 1 {
			return fmt.Errorf("there are %d ProtectedVolumes; %s", len(list.Items), strings.Join(said, ", "))
		}
		pv = list.Items[0]
		for _, p := range pv.Status.Points {
			if p.ID == first.ID {
				return fmt.Errorf("the oldest of %d points is still there; %s", len(pv.Status.Points), strings.Join(said, ", "))
			}
		}
		if pv.Status.LastScheduled == nil || pv.Status.LastPrune == nil {
			return errors.New(strings.Join(said, ", "))
		}
		return ready(pv.Status.Conditions, v1alpha1.ConditionProtected)
	})
	if n := pv.Status.PointCount; n != 2 {
		t.Errorf("%d points are left, not 2: %+v", n, pv.Status.Points)
	}
	if next := pv.Status.NextRun; next == nil || next.Sub(pv.Status.LastScheduled.Time) < time.Minute {
		t.Errorf("the last run was at %s, the next is at %v", pv.Status.LastScheduled, next)
	}
	var policy v1alpha1.BackupPolicy
	if err := s.Client.Get(t.Context(), s.Key("minutely"), &policy); err != nil {
		t.Fatal(err)
	}
	if err := ready(policy.Status.Conditions, v1alpha1.ConditionReady); err != nil || policy.Status.Claims != 1 {
		t.Errorf("the policy has %d claims, %v", policy.Status.Claims, err)
	}
	// A deleted point cannot be restored, and the claim says so.
	s.source("gone", func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Volume, rs.Spec.At.ID = "data", first.ID })
	s.restoreClaim(restored{Claim: framework.Claim{Name: "back", Mode: framework.Block, Size: "16Mi"}, Source: "gone"})
	s.waitEvent("back", v1alpha1.ReasonNoRecoveryPoint)
	s.pending("back")
}

// A tenant's retention cannot go below the store's floor, and does not delete what the
// store's administrator pinned.
func TestRetentionFloor(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	name := s.Namespace
	s.store(name, s.bucket("floor-"+s.Namespace[len(s.Namespace)-6:]), func(bs *v1alpha1.BackupStore) {
		bs.Spec.RetentionFloor = &v1alpha1.RetentionFloor{Points: 2}
	})
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "16Mi"})
	s.WaitBound("data")
	run := func(run string) *v1alpha1.VolumeBackup {
		return s.backup(run, "data", func(vb *v1alpha1.VolumeBackup) {
			vb.Spec.StoreRef.Name, vb.Spec.Retention = name, &v1alpha1.Retention{Latest: 1}
		})
	}
	first := run("first").Status.Point.ID
	var bs v1alpha1.BackupStore
	s.Eventually("the pin", func(ctx context.Context) error {
		if err := s.Client.Get(ctx, client.ObjectKey{Name: name}, &bs); err != nil {
			return err
		}
		if len(bs.Spec.Pins) == 0 {
			bs.Spec.Pins = []v1alpha1.PointPin{{ID: first, Reason: "case 1234"}}
			if err := s.Client.Update(ctx, &bs); err != nil {
				return err
			}
		}
		return ready(bs.Status.Conditions, v1alpha1.ConditionPinned)
	})
	second := run("second").Status.Point.ID
	run("third")
	last := run("fourth")
	listed := map[string]bool{}
	for _, p := range last.Status.Points {
		listed[p.ID] = true
	}
	if last.Status.PointCount != 3 || !listed[first] || listed[second] {
		t.Errorf("of four points %d are left, with the pinned one: %v, the second: %v; want two and the pinned one", last.Status.PointCount, listed[first], listed[second])
	}
}

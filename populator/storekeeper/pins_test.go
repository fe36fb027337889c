package storekeeper

import (
	"context"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/store/storetest"
)

// What the store's spec pins is pinned in the repository, until it leaves the spec.
func TestPins(t *testing.T) {
	_, k, _ := newKeeper(t)
	k.reconcileMain(t)
	var o v1alpha1.BackupStore
	get := func() {
		t.Helper()
		if err := k.Client.Get(t.Context(), client.ObjectKey{Name: "main"}, &o); err != nil {
			t.Fatal(err)
		}
	}
	with := func(do func(*store.Open) error) {
		t.Helper()
		get()
		if err := k.Stores.With(t.Context(), k.Stores.FromBackupStore(&o), func(_ context.Context, o *store.Open) error { return do(o) }); err != nil {
			t.Fatal(err)
		}
	}
	var id string
	with(func(repo *store.Open) error {
		p, _, err := backup.Run(t.Context(), repo.Repository, backup.Options{Disk: storetest.Zeroes(1 << 20), Volume: points.Volume{Namespace: "shop", Name: "data", Cluster: "here"}})
		if err == nil {
			id = p.ID
		}
		return err
	})
	for _, tc := range []struct {
		name   string
		pins   []v1alpha1.PointPin
		pinned string // on the point
		status metav1.ConditionStatus
		says   string
	}{
		{"pinned", []v1alpha1.PointPin{{ID: id[:8], Reason: "case 7"}}, "here/BackupStore/main: case 7", metav1.ConditionTrue, "1 recovery points"},
		{"one is not there", []v1alpha1.PointPin{{ID: id}, {ID: "ffffffff"}}, "here/BackupStore/main", metav1.ConditionFalse, "ffffffff: no such recovery point"},
		{"taken out", nil, "", metav1.ConditionTrue, "0 recovery points"},
	} {
		get()
		o.Spec.Pins = tc.pins
		o.Generation++ // the fake client does not count
		if err := k.Client.Update(t.Context(), &o); err != nil {
			t.Fatal(err)
		}
		s := k.reconcileMain(t)
		c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionPinned)
		if c == nil || c.Status != tc.status || !strings.Contains(c.Message, tc.says) {
			t.Errorf("%s: condition %+v", tc.name, c)
		}
		if !meta.IsStatusConditionTrue(s.Conditions, v1alpha1.ConditionReady) {
			t.Errorf("%s: the store is not ready: %+v", tc.name, s.Conditions)
		}
		with(func(repo *store.Open) error {
			cat, err := points.List(t.Context(), repo.Repository, points.ListOptions{})
			if err == nil && strings.Join(cat.ByID(id).Pins, ",") != tc.pinned {
				t.Errorf("%s: pins %q", tc.name, cat.ByID(id).Pins)
			}
			return err
		})
	}
}

package backups

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/claims"
)

// Backups of a claim that should have been filled, but was not, replace no good points.
func TestRetentionOfClaimsBoundWithoutVarve(t *testing.T) {
	for _, tc := range []struct {
		name         string
		names, fills bool
		dropped      bool // by the API server, as kubectl's annotation shows
		applied      bool
	}{
		{"names nothing", false, false, false, true},
		{"filled by Varve", true, true, false, true},
		{"not filled", true, false, false, false},
		{"its reference was dropped", false, false, true, false},
		{"its reference was dropped, and it was looked at", false, true, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, b := newCluster(t)
			var pvc corev1.PersistentVolumeClaim
			var pv corev1.PersistentVolume
			if err := c.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "data"}, &pvc); err != nil {
				t.Fatal(err)
			}
			if err := c.Get(t.Context(), client.ObjectKey{Name: "pv"}, &pv); err != nil {
				t.Fatal(err)
			}
			if tc.names {
				pvc.Spec.DataSourceRef = &corev1.TypedObjectReference{APIGroup: &v1alpha1.GroupVersion.Group, Kind: "RecoverySource", Name: "latest"}
			}
			if tc.dropped {
				metav1.SetMetaDataAnnotation(&pvc.ObjectMeta, corev1.LastAppliedConfigAnnotation,
					`{"spec":{"dataSourceRef":{"apiGroup":"varve.io","kind":"RecoverySource","name":"latest","namespace":"other"}}}`)
			}
			if tc.fills {
				metav1.SetMetaDataAnnotation(&pv.ObjectMeta, claims.AnnotationPopulatedFrom, "0123")
			}
			for _, o := range []client.Object{&pvc, &pv} {
				if err := c.Update(t.Context(), o); err != nil {
					t.Fatal(err)
				}
			}
			vb := newRun("run", "Read")
			vb.Spec.Retention = &v1alpha1.Retention{Latest: 1}
			p, err := (&run{Reconciler: b, vb: vb}).retention(t.Context())
			if err != nil || (p != nil) != tc.applied {
				t.Errorf("retention %v, %v", p, err)
			}
		})
	}
}

// A run may request any retention: the store's floor is added.
func TestRetentionHasTheStoresFloor(t *testing.T) {
	c, b := newCluster(t)
	var o v1alpha1.BackupStore
	if err := c.Get(t.Context(), client.ObjectKey{Name: "main"}, &o); err != nil {
		t.Fatal(err)
	}
	o.Spec.RetentionFloor = &v1alpha1.RetentionFloor{Points: 3, Age: &metav1.Duration{Duration: time.Hour}}
	if err := c.Update(t.Context(), &o); err != nil {
		t.Fatal(err)
	}
	vb := newRun("run", "Read")
	vb.Spec.Retention = &v1alpha1.Retention{Latest: 1}
	p, err := (&run{Reconciler: b, vb: vb}).retention(t.Context())
	if err != nil || p == nil || p.Latest != 1 || p.Floor.Points != 3 || p.Floor.Age != time.Hour {
		t.Errorf("retention %+v, %v", p, err)
	}
}

// A run records its namespace's UID, since a namespace of the same name may follow.
func TestRunNotesItsNamespace(t *testing.T) {
	_, b := newCluster(t, newRun("run", ""))
	if vb := b.look(t, "run"); vb.Status.Step == "" || vb.Status.NamespaceUID != "namespace" {
		t.Errorf("at step %q the run is of namespace %q", vb.Status.Step, vb.Status.NamespaceUID)
	}
}

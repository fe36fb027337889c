package backups

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/claims"
)

// Backups of a claim that should have been filled, and was not, push out no good points.
func TestRetentionOfClaimsBoundWithoutVarve(t *testing.T) {
	for _, tc := range []struct {
		name         string
		names, fills bool
		applied      bool
	}{
		{"names nothing", false, false, true},
		{"filled by Varve", true, true, true},
		{"not filled", true, false, false},
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

package metrics

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/queue"
)

// Volumes are reported for existing claims that are to be backed up; stores of both kinds
// may have one name.
func TestVolumes(t *testing.T) {
	s := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(s), v1alpha1.AddToScheme(s)); err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(s).Build()
	claim := func(name string, labels map[string]string) {
		t.Helper()
		if err := c.Create(t.Context(), &corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(name), Labels: labels},
			Status:     corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound},
		}); err != nil {
			t.Fatal(err)
		}
	}
	at := metav1.NewTime(time.Unix(1_700_000_000, 0))
	volume := func(claim string, uid types.UID, kind v1alpha1.StoreKind, success *metav1.Time) {
		t.Helper()
		if err := c.Create(t.Context(), &v1alpha1.ProtectedVolume{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: strings.ToLower(claim + "-" + string(kind))},
			Spec:       v1alpha1.ProtectedVolumeSpec{ClaimName: claim, StoreRef: v1alpha1.StoreReference{Kind: kind, Name: "main"}},
			Status:     v1alpha1.ProtectedVolumeStatus{ClaimUID: uid, LastSuccess: success},
		}); err != nil {
			t.Fatal(err)
		}
	}
	claim("twice", nil)
	volume("twice", "twice", v1alpha1.StoreKindBackupStore, &at)
	volume("twice", "twice", v1alpha1.StoreKindRepository, &at)
	claim("never", nil)
	volume("never", "never", v1alpha1.StoreKindBackupStore, nil)
	claim("out", map[string]string{v1alpha1.OptOutLabel: "true"})
	volume("out", "out", v1alpha1.StoreKindBackupStore, &at)
	volume("gone", "gone", v1alpha1.StoreKindBackupStore, &at)
	claim("anew", nil)
	volume("anew", "before", v1alpha1.StoreKindBackupStore, &at)

	r := prometheus.NewPedanticRegistry()
	if err := r.Register(&Volumes{Client: c, Namespace: "varve", Queue: queue.New(0, nil)}); err != nil {
		t.Fatal(err)
	}
	if err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP varve_unprotected_volumes Bound claims that have no recovery point and have not opted out.
# TYPE varve_unprotected_volumes gauge
varve_unprotected_volumes 2
# HELP varve_volume_last_success_timestamp_seconds Time of the newest recovery point of a claim.
# TYPE varve_volume_last_success_timestamp_seconds gauge
varve_volume_last_success_timestamp_seconds{claim="anew",namespace="shop",store="BackupStore/main"} 1.7e+09
varve_volume_last_success_timestamp_seconds{claim="twice",namespace="shop",store="BackupStore/main"} 1.7e+09
varve_volume_last_success_timestamp_seconds{claim="twice",namespace="shop",store="Repository/shop/main"} 1.7e+09
`), "varve_unprotected_volumes", "varve_volume_last_success_timestamp_seconds"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(r, "varve_volume_rpo_seconds"); n != 3 || err != nil {
		t.Errorf("%d series of varve_volume_rpo_seconds (%v), want 3", n, err)
	}
}

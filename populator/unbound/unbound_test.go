package unbound

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

// happened is an event of a claim, so many seconds after the first.
func happened(of types.UID, second int64, reason, message string) *corev1.Event {
	return &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: "varve", Name: string(of) + reason + time.Duration(second).String() + message},
		InvolvedObject: corev1.ObjectReference{UID: of}, Reason: reason, Message: message, LastTimestamp: metav1.Unix(1000+second, 0),
	}
}

const failedWith = `failed to provision volume with StorageClass "fast": rpc error: code = `

func TestMaking(t *testing.T) {
	asked := map[string]string{AnnProvisioner: "csi"}
	for _, tc := range []struct {
		name        string
		annotations map[string]string
		volume      string
		class       string
		events      []*corev1.Event
		making      bool
	}{
		{"nobody was asked", nil, "", "fast", nil, false},
		{"bound", asked, "pv", "fast", []*corev1.Event{happened("claim", 1, ReasonProvisioning, "")}, false},
		{"asked", asked, "", "fast", nil, true},
		{"asked, by the older name", map[string]string{annBetaProvisioner: "csi"}, "", "fast", nil, true},
		{"asked, of a class that is gone", asked, "", "gone", nil, true},
		{"begun", asked, "", "fast", []*corev1.Event{happened("claim", 1, ReasonProvisioning, "")}, true},
		{"timed out", asked, "", "fast", []*corev1.Event{
			happened("claim", 1, ReasonProvisioning, ""), happened("claim", 11, ReasonFailed, failedWith+"DeadlineExceeded desc = context deadline exceeded")}, true},
		{"aborted", asked, "", "fast", []*corev1.Event{happened("claim", 11, ReasonFailed, failedWith+"Aborted desc = an operation is pending")}, true},
		{"refused", asked, "", "fast", []*corev1.Event{
			happened("claim", 1, ReasonProvisioning, ""), happened("claim", 1, ReasonFailed, failedWith+"InvalidArgument desc = no")}, false},
		{"refused after it timed out", asked, "", "fast", []*corev1.Event{
			happened("claim", 5, ReasonFailed, failedWith+"DeadlineExceeded desc = late"), happened("claim", 9, ReasonFailed, failedWith+"Internal desc = no")}, false},
		{"timed out after it was refused", asked, "", "fast", []*corev1.Event{
			happened("claim", 9, ReasonFailed, failedWith+"DeadlineExceeded desc = late"), happened("claim", 5, ReasonFailed, failedWith+"Internal desc = no")}, true},
		{"refused, and begun again", asked, "", "fast", []*corev1.Event{
			happened("claim", 5, ReasonFailed, failedWith+"Internal desc = no"), happened("claim", 7, ReasonProvisioning, "")}, true},
		{"not sent", asked, "", "fast", []*corev1.Event{
			happened("claim", 1, ReasonProvisioning, ""), happened("claim", 2, ReasonFailed, "snapshot varve-twin is not found")}, false},
		{"timed out, then not sent", asked, "", "fast", []*corev1.Event{
			happened("claim", 2, ReasonFailed, failedWith+"Unavailable desc = gone"), happened("claim", 8, ReasonFailed, "snapshot varve-twin is not found")}, true},
		{"another claim of the name was refused", asked, "", "fast", []*corev1.Event{happened("earlier", 9, ReasonFailed, failedWith+"Internal desc = no")}, true},
		{"given back to the scheduler", asked, "", "wffc", []*corev1.Event{happened("claim", 1, ReasonProvisioning, "")}, false},
		{"begun for a node", map[string]string{AnnProvisioner: "csi", annSelectedNode: "n1"}, "", "wffc", []*corev1.Event{happened("claim", 1, ReasonProvisioning, "")}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			scheme := runtime.NewScheme()
			if err := corev1.AddToScheme(scheme); err != nil {
				t.Fatal(err)
			}
			if err := storagev1.AddToScheme(scheme); err != nil {
				t.Fatal(err)
			}
			now, later := storagev1.VolumeBindingImmediate, storagev1.VolumeBindingWaitForFirstConsumer
			objects := []client.Object{
				&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "fast"}, VolumeBindingMode: &now},
				&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "wffc"}, VolumeBindingMode: &later},
			}
			for _, e := range tc.events {
				objects = append(objects, e)
			}
			claim := &corev1.PersistentVolumeClaim{
				ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "claim", UID: "claim", Annotations: tc.annotations},
				Spec:       corev1.PersistentVolumeClaimSpec{StorageClassName: &tc.class, VolumeName: tc.volume},
			}
			what, err := Making(t.Context(), fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).Build(), claim)
			if err != nil || (what != "") != tc.making {
				t.Errorf("%q, %v", what, err)
			}
		})
	}
}

package mover

import (
	"testing"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/store"
)

// A mover of a store on a claim is of the group that its files belong to: without any
// capability, user 0 reads no others.
func TestGroupOfVolumeStores(t *testing.T) {
	for _, tc := range []struct {
		nonRoot     bool
		volume      *v1alpha1.VolumeStorage
		user, group int64
	}{
		{false, nil, 0, 0},
		{true, nil, nonRootID, nonRootID},
		{false, &v1alpha1.VolumeStorage{ClaimName: "nfs"}, 0, store.VolumeGroup},
	} {
		job, err := Pods{Namespace: "varve", NonRoot: tc.nonRoot}.Build(Job{Name: "j", Task: Task{Action: ActionMaintain}, StoreVolume: tc.volume})
		if err != nil {
			t.Fatal(err)
		}
		if s := job.Spec.Template.Spec.SecurityContext; *s.RunAsUser != tc.user || *s.RunAsGroup != tc.group {
			t.Errorf("%+v: runs as %d:%d", tc, *s.RunAsUser, *s.RunAsGroup)
		}
	}
}

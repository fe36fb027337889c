package mover

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/store"
)

// A mover of a store on a claim has the group of its files: without any capability, user
// 0 reads no others.
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

func TestProxyOfMovers(t *testing.T) {
	for _, tc := range []struct{ pods, store, noProxy, want, wantNo string }{
		{},
		{pods: "http://a:1", want: "http://a:1", wantNo: ".svc,.cluster.local"},
		{pods: "http://a:1", store: "http://b:2", noProxy: "10.0.0.1", want: "http://b:2", wantNo: "10.0.0.1,.svc,.cluster.local"},
		{store: "http://b:2", want: "http://b:2", wantNo: ".svc,.cluster.local"},
	} {
		job, err := Pods{Proxy: tc.pods, NoProxy: tc.noProxy}.Build(Job{Name: "j", Task: Task{Action: ActionMaintain}, Proxy: tc.store})
		if err != nil {
			t.Fatal(err)
		}
		env := map[string]string{}
		for _, e := range job.Spec.Template.Spec.Containers[0].Env {
			env[e.Name] = e.Value
		}
		if env["HTTPS_PROXY"] != tc.want || env["NO_PROXY"] != tc.wantNo {
			t.Errorf("%+v: HTTPS_PROXY %q, NO_PROXY %q", tc, env["HTTPS_PROXY"], env["NO_PROXY"])
		}
	}
}

// Files with credentials are in memory: the connection's configuration, and what Kopia
// writes to the temporary directory (known hosts, rclone's configuration).
func TestCredentialsAreOnNoDisk(t *testing.T) {
	job, err := Pods{}.Build(Job{Name: "j", Task: Task{Action: ActionMaintain}})
	if err != nil {
		t.Fatal(err)
	}
	pod := job.Spec.Template.Spec
	mounted := map[string]string{}
	for _, m := range pod.Containers[0].VolumeMounts {
		mounted[m.MountPath] = m.Name
	}
	for _, v := range pod.Volumes {
		if v.Name == mounted[ConfigDir] && (v.EmptyDir == nil || v.EmptyDir.Medium != corev1.StorageMediumMemory) {
			t.Errorf("%s is on %+v", ConfigDir, v.VolumeSource)
		}
	}
	for _, e := range pod.Containers[0].Env {
		if e.Name == "TMPDIR" && e.Value != ConfigDir {
			t.Errorf("TMPDIR is %s", e.Value)
		}
	}
}

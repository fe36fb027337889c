package claims

import (
	"context"
	"slices"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

func (w *world) choose(node string) {
	w.t.Helper()
	c := w.claim()
	metav1.SetMetaDataAnnotation(&c.ObjectMeta, annSelectedNode, node)
	w.must(w.c.Update(w.t.Context(), c))
}

// TestWaitForFirstConsumer: nothing is made before the scheduler has chosen, its choice
// is passed on, and it chooses again if nothing can be made there.
func TestWaitForFirstConsumer(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(*world)
	}{
		{"fine", func(*world) {}},
		{"the storage gives up", func(w *world) { w.noNode = true }},
		{"the node is gone", func(w *world) {
			w.must(w.c.Delete(w.t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}))
		}},
		{"the node is cordoned", func(w *world) {
			w.must(w.c.Update(w.t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Spec: corev1.NodeSpec{Unschedulable: true}}))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "wffc"))
			in := w.start(nil)
			in.turns(t, 5)
			if len(w.disks) > 0 || w.claim().Spec.VolumeName != "" {
				t.Fatalf("made before the scheduler chose: %s", w.dump())
			}
			tc.prepare(w)
			w.choose("n1")
			in.run(t, func() bool {
				if w.claim().Annotations[annSelectedNode] == "" { // asked to choose again
					w.choose("n2")
				}
				return w.settled()
			})
			if len(w.disks) != 1 {
				t.Errorf("storage: %v", w.disks)
			}
		})
	}
}

// TestMoverFails checks what follows failed movers.
func TestMoverFails(t *testing.T) {
	ok := func(j *batchv1.Job) Outcome {
		return Outcome{State: Succeeded, PointID: j.Annotations["point"], VerifiedBytes: diskSize, FileSystem: "ext4"}
	}
	for _, tc := range []struct {
		name    string
		mode    corev1.PersistentVolumeMode
		outcome func(attempt int, j *batchv1.Job) Outcome
		event   string
		bound   bool
	}{
		{name: "the repository is away for long", mode: corev1.PersistentVolumeBlock, bound: true, event: "RepositoryUnreachable",
			outcome: func(n int, j *batchv1.Job) Outcome {
				if n < 12 {
					return Outcome{State: Failed, Reason: v1alpha1.ReasonRepositoryUnreachable, Message: "no route to host"}
				}
				return ok(j)
			}},
		{name: "once", mode: corev1.PersistentVolumeBlock, bound: true, event: "MoverFailed",
			outcome: func(n int, j *batchv1.Job) Outcome {
				if n < 2 {
					return Outcome{State: Failed, Reason: v1alpha1.ReasonMoverFailed, Message: "killed"}
				}
				return ok(j)
			}},
		{name: "always", mode: corev1.PersistentVolumeBlock, event: "given up after 5 attempts",
			outcome: func(int, *batchv1.Job) Outcome {
				return Outcome{State: Failed, Reason: v1alpha1.ReasonRestoreFailed, Message: "reads back different"}
			}},
		{name: "half of it", mode: corev1.PersistentVolumeBlock, event: "given up after 5 attempts",
			outcome: func(_ int, j *batchv1.Job) Outcome {
				o := ok(j)
				o.VerifiedBytes--
				return o
			}},
		{name: "another point", mode: corev1.PersistentVolumeBlock, event: "given up after 5 attempts",
			outcome: func(_ int, j *batchv1.Job) Outcome {
				o := ok(j)
				o.PointID = strings.Repeat("f", 32)
				return o
			}},
		{name: "no file system", mode: corev1.PersistentVolumeFilesystem, event: "UnknownFileSystem",
			outcome: func(_ int, j *batchv1.Job) Outcome {
				o := ok(j)
				o.FileSystem = ""
				return o
			}},
		{name: "a partition table is none", mode: corev1.PersistentVolumeFilesystem, event: "LVM2_member",
			outcome: func(_ int, j *batchv1.Job) Outcome {
				o := ok(j)
				o.FileSystem = "LVM2_member"
				return o
			}},
		{name: "no file system is fine for Block", mode: corev1.PersistentVolumeBlock, bound: true, event: "Populated",
			outcome: func(_ int, j *batchv1.Job) Outcome {
				o := ok(j)
				o.FileSystem = ""
				return o
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, newClaim(tc.mode, "fast"))
			w.point.VolumeMode = tc.mode
			var seen []string
			w.outcome = func(j *batchv1.Job) Outcome {
				if !slices.Contains(seen, j.Name) {
					seen = append(seen, j.Name)
				}
				o := tc.outcome(len(seen), j)
				if o.State == Succeeded {
					w.write(j)
				}
				return o
			}
			in := w.start(nil)
			if tc.bound {
				in.run(t, w.settled)
			} else {
				in.turns(t, 40)
				if c := w.claim(); c.Spec.VolumeName != "" || len(w.disks) > 0 {
					t.Errorf("not given up: %s", w.dump())
				}
				pop := list(w, &v1alpha1.VolumePopulationList{}).Items[0]
				if pop.Status.Step != stepFailed {
					t.Errorf("step %s", pop.Status.Step)
				}
			}
			if !w.hasEvent(tc.event) {
				t.Errorf("events: %q", w.events)
			}
			if !tc.bound { // and deleting the claim leaves nothing
				w.must(w.c.Delete(t.Context(), w.claim()))
				in.run(t, w.empty)
			}
		})
	}
}

// write puts the point on the prime's disk, as a mover would.
func (w *world) write(j *batchv1.Job) {
	w.t.Helper()
	var prime corev1.PersistentVolumeClaim
	var pv corev1.PersistentVolume
	w.must(w.c.Get(w.t.Context(), client.ObjectKey{Namespace: varveNS, Name: j.Annotations["prime"]}, &prime))
	w.must(w.c.Get(w.t.Context(), client.ObjectKey{Name: prime.Spec.VolumeName}, &pv))
	if pv.Spec.CSI != nil {
		w.disks[pv.Spec.CSI.VolumeHandle] = j.Annotations["point"]
	}
}

// TestShortDevice requests a larger volume if the disk does not fit.
func TestShortDevice(t *testing.T) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "fast"))
	w.short = true
	w.start(nil).run(t, w.settled)
	pv := list(w, &corev1.PersistentVolumeList{}).Items[0]
	if got := pv.Spec.Capacity.Storage().Value(); got != diskSize+4096 {
		t.Errorf("volume of %d bytes", got)
	}
	if len(w.disks) != 1 {
		t.Errorf("storage: %v", w.disks)
	}
}

// TestNewVolume checks what the swap's volume copies.
func TestNewVolume(t *testing.T) {
	claim := newClaim(corev1.PersistentVolumeFilesystem, "secret")
	claim.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadOnlyMany}
	immediate := storagev1.VolumeBindingImmediate
	w := newWorld(t, claim,
		&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "secret"}, Provisioner: "csi", VolumeBindingMode: &immediate, Parameters: map[string]string{
			"csi.storage.k8s.io/node-stage-secret-name": "${pvc.name}-key", "csi.storage.k8s.io/node-stage-secret-namespace": "${pvc.namespace}",
			"csi.storage.k8s.io/provisioner-secret-name": "admin", "csi.storage.k8s.io/provisioner-secret-namespace": "storage",
		}},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "data-key"}, Data: map[string][]byte{"key": []byte("k")}},
	)
	w.point.VolumeMode = corev1.PersistentVolumeFilesystem
	w.outcome = func(j *batchv1.Job) Outcome {
		w.write(j)
		return Outcome{State: Succeeded, PointID: pointID, VerifiedBytes: diskSize, FileSystem: "xfs"}
	}
	copied := false
	in := w.start(func(_ context.Context, wr step.Write) error {
		copied = copied || wr.Kind == "Secret" && wr.Verb == "create" && wr.Name == varveNS+"/prime-11111111-aaaa-key"
		return nil
	})
	in.run(t, w.settled)
	pv := list(w, &corev1.PersistentVolumeList{}).Items[0]
	if pv.Name != "varve-11111111-aaaa" || pv.Spec.CSI.FSType != "xfs" || !slices.Equal(pv.Spec.MountOptions, []string{"nouuid"}) ||
		!slices.Equal(pv.Spec.AccessModes, claim.Spec.AccessModes) || pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete ||
		pv.Annotations[annProvisionedBy] != "csi" || pv.Spec.CSI.VolumeHandle == "" {
		t.Errorf("volume %+v", pv)
	}
	if !copied {
		t.Error("the Secret was not copied for the prime")
	}
}

// TestTenantSecrets: classes whose Secrets cannot be known are refused.
func TestTenantSecrets(t *testing.T) {
	immediate := storagev1.VolumeBindingImmediate
	for name, params := range map[string][2]string{
		"by volume":            {"${pv.name}", "${pvc.namespace}"},
		"in another namespace": {"${pvc.name}", "keys"},
		"missing":              {"${pvc.name}-key", "${pvc.namespace}"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "secret"), &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "secret"},
				Provisioner: "csi", VolumeBindingMode: &immediate, Parameters: map[string]string{
					"csi.storage.k8s.io/node-stage-secret-name": params[0], "csi.storage.k8s.io/node-stage-secret-namespace": params[1]}})
			w.start(nil).turns(t, 6)
			if !w.hasEvent("Warning TenantSecrets") || len(w.disks) > 0 {
				t.Errorf("%s", w.dump())
			}
		})
	}
}

// Steps recorded by an earlier version map to current ones.
func TestStepsOfEarlierVersions(t *testing.T) {
	for recorded, want := range map[string]string{"": "", "write": "Write", "drop-prime-volume": "DropPrimeVolume", "failed": stepFailed} {
		if got := stepOf(&v1alpha1.VolumePopulation{Status: v1alpha1.VolumePopulationStatus{Step: recorded}}); got != want {
			t.Errorf("%q is step %q, want %q", recorded, got, want)
		}
	}
	for _, l := range Lists() {
		for _, name := range l.Names() {
			if got := stepOf(&v1alpha1.VolumePopulation{Status: v1alpha1.VolumePopulationStatus{Step: name}}); got != name {
				t.Errorf("step %s is read as %q", name, got)
			}
		}
	}
}

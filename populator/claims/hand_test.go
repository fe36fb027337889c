package claims

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/replace"
)

// bound makes a claim with a volume, on node n2 only, which holds the point to satisfy the
// world's checks, and a population for a VolumeRestore of it.
func bound(t *testing.T, class, inPlace string) (*world, *incarnation, func() *v1alpha1.VolumePopulation) {
	t.Helper()
	claim := newClaim(corev1.PersistentVolumeFilesystem, class)
	claim.Spec.DataSourceRef, claim.Spec.VolumeName, claim.Status.Phase = nil, "pv-own", corev1.ClaimBound
	own := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-own"}, Spec: corev1.PersistentVolumeSpec{
		Capacity: claim.Spec.Resources.Requests, AccessModes: claim.Spec.AccessModes, VolumeMode: claim.Spec.VolumeMode, StorageClassName: class,
		PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
		ClaimRef:                      &corev1.ObjectReference{Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID},
		NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{
			{Key: "zone", Operator: corev1.NodeSelectorOpIn, Values: []string{"b"}}}}}}},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi", VolumeHandle: "own"}}},
		Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeBound}}
	w := newWorld(t, claim, own)
	w.point.VolumeMode, w.shared = corev1.PersistentVolumeFilesystem, true
	w.disks["own"] = pointID
	for name, zone := range map[string]string{"n1": "a", "n2": "b"} {
		var n corev1.Node
		w.must(w.c.Get(t.Context(), client.ObjectKey{Name: name}, &n))
		n.Labels = map[string]string{"zone": zone}
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		w.put(&n)
	}
	in := w.start(nil)
	pop := &v1alpha1.VolumePopulation{Spec: v1alpha1.VolumePopulationSpec{
		Claim: v1alpha1.ClaimReference{Namespace: userNS, Name: claim.Name, UID: claim.UID}, PointID: pointID, PointBytes: diskSize,
		VolumeMode: corev1.PersistentVolumeFilesystem, StorageClassName: class, Restore: &v1alpha1.RestoreReference{Name: "back", UID: "restore", InPlace: inPlace}}}
	w.must(in.deps.Begin(t.Context(), pop))
	return w, in, func() *v1alpha1.VolumePopulation {
		var now v1alpha1.VolumePopulation
		if err := w.c.Get(t.Context(), client.ObjectKeyFromObject(pop), &now); err != nil {
			return nil
		}
		return &now
	}
}

// A volume for a VolumeRestore is made where the claim's own can be used, even if the provisioner
// gives up on the node at first; the claim is unchanged. The volume is removed with the
// population, unless a claim has it by then.
func TestForRestore(t *testing.T) {
	for _, class := range []string{"fast", "wffc"} {
		w, in, now := bound(t, class, "")
		w.noNode = class == "wffc"
		in.run(t, func() bool { return now().Status.Step == StepWritten })
		if got := now().Status.SelectedNode; got != map[string]string{"fast": "", "wffc": "n2"}[class] {
			t.Errorf("%s: made for node %q", class, got)
		}
		if c := w.claim(); c.Spec.VolumeName != "pv-own" || len(c.Finalizers) != 1 || len(c.Annotations) > 0 {
			t.Errorf("the claim was changed: %+v", c.ObjectMeta)
		}
		manifest, source, prime, err := in.deps.Taken(t.Context(), now(), w.claim())
		if err != nil {
			t.Fatal(err)
		}
		if manifest.Name != "pv-own" || manifest.Spec.ClaimRef.UID != w.claim().UID || manifest.Spec.CSI.VolumeHandle != source.Spec.CSI.VolumeHandle ||
			*manifest.Spec.VolumeMode != corev1.PersistentVolumeFilesystem || manifest.Spec.CSI.FSType != "ext4" || prime.Name != PrimePrefix+"restore" {
			t.Errorf("taken: %+v", manifest)
		}
		other := replace.Manifest(source, "other")
		w.must(w.c.Create(t.Context(), other))
		w.must(w.c.Delete(t.Context(), now()))
		for range 5 {
			in.round(t)
			w.provision()
			w.bind()
			w.reclaim()
		}
		if len(w.disks) != 2 {
			t.Fatal("the storage's volume was deleted although another object names it")
		}
		w.must(w.c.Delete(t.Context(), other))
		in.run(t, func() bool { return now() == nil })
		if len(w.disks) != 1 || len(w.leftovers()) > 0 {
			t.Error(w.dump())
		}
	}
}

// The objects through which a claim's own volume was written are deleted without the volume.
func TestInPlace(t *testing.T) {
	w, in, now := bound(t, "fast", "pv-own")
	w.disks["own"] = "what was before"
	w.findErr = errKilled // for the world: the claim may hold anything
	in.run(t, func() bool { return now().Status.Step == StepWritten })
	if w.disks["own"] != pointID || len(w.disks) != 1 {
		t.Fatal(w.dump())
	}
	w.must(w.c.Delete(t.Context(), now()))
	in.run(t, func() bool { return now() == nil })
	if own := list(w, &corev1.PersistentVolumeList{}).Items; len(own) != 1 || own[0].Name != "pv-own" || w.disks["own"] != pointID || len(w.leftovers()) > 0 {
		t.Error(w.dump())
	}
}

func TestReaches(t *testing.T) {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{"zone": "a", "disks": "4"}}}
	is := func(key string, op corev1.NodeSelectorOperator, values ...string) corev1.NodeSelectorRequirement {
		return corev1.NodeSelectorRequirement{Key: key, Operator: op, Values: values}
	}
	term := func(all ...corev1.NodeSelectorRequirement) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchExpressions: all}
	}
	for _, tc := range []struct {
		name  string
		terms []corev1.NodeSelectorTerm
		want  bool
	}{
		{"in", []corev1.NodeSelectorTerm{term(is("zone", corev1.NodeSelectorOpIn, "a", "b"))}, true},
		{"not in", []corev1.NodeSelectorTerm{term(is("zone", corev1.NodeSelectorOpNotIn, "a"))}, false},
		{"both", []corev1.NodeSelectorTerm{term(is("zone", corev1.NodeSelectorOpIn, "a"), is("x", corev1.NodeSelectorOpExists))}, false},
		{"either", []corev1.NodeSelectorTerm{term(is("x", corev1.NodeSelectorOpExists)), term(is("disks", corev1.NodeSelectorOpGt, "3"))}, true},
		{"name", []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{is("metadata.name", corev1.NodeSelectorOpIn, "n1")}}}, true},
		{"other name", []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{is("metadata.name", corev1.NodeSelectorOpIn, "n2")}}}, false},
		{"an empty term matches nothing", []corev1.NodeSelectorTerm{{}}, false},
		{"an unknown operator", []corev1.NodeSelectorTerm{term(is("zone", "Like", "a"))}, false},
	} {
		if got := reaches(&corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: tc.terms}}, n); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
	if !reaches(nil, n) {
		t.Error("a volume without affinity is reached from everywhere")
	}
}

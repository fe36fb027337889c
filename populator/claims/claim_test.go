package claims

import (
	"errors"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
)

func (w *world) hasEvent(part string) bool {
	return slices.ContainsFunc(w.events, func(e string) bool { return strings.Contains(e, part) })
}

// turns lets controller and world take so many turns.
func (in *incarnation) turns(t *testing.T, n int) {
	t.Helper()
	for range n {
		in.round(t)
		in.w.turn()
		in.w.now = in.w.now.Add(lastRetry)
	}
}

// TestRefusals: refused claims stay pending, with an event, and nothing is made for them.
func TestRefusals(t *testing.T) {
	for _, tc := range []struct {
		name  string
		mode  corev1.PersistentVolumeMode
		world func(*world)
		claim func(*corev1.PersistentVolumeClaim)
		event string
	}{
		{name: "block to files", mode: corev1.PersistentVolumeFilesystem, event: "Warning VolumeModeMismatch"},
		{name: "files to block", mode: corev1.PersistentVolumeBlock, event: "Warning VolumeModeMismatch",
			world: func(w *world) { w.point.VolumeMode = corev1.PersistentVolumeFilesystem }},
		{name: "files from who knows what", mode: corev1.PersistentVolumeFilesystem, event: "Warning VolumeModeMismatch",
			world: func(w *world) { w.point.VolumeMode = "" }},
		{name: "smaller than asked for before", mode: corev1.PersistentVolumeBlock, event: "Warning ClaimTooSmall",
			world: func(w *world) { w.point.RequestBytes = diskSize + 1 }},
		{name: "a stream", mode: corev1.PersistentVolumeBlock, event: "Warning InvalidSpec",
			world: func(w *world) { w.point.Stream = true }},
		{name: "no point", mode: corev1.PersistentVolumeBlock, event: "Warning NoRecoveryPoint",
			world: func(w *world) {
				w.findErr = &RefusedError{Reason: v1alpha1.ReasonNoRecoveryPoint, Message: "none", NoneAtAll: true}
			}},
		{name: "not granted", mode: corev1.PersistentVolumeBlock, event: "Warning NotGranted",
			world: func(w *world) { w.findErr = &RefusedError{Reason: v1alpha1.ReasonNotGranted, Message: "no"} }},
		{name: "unreachable", mode: corev1.PersistentVolumeBlock, event: "Warning RepositoryUnreachable",
			world: func(w *world) { w.findErr = errors.New("no route to host") }},
		{name: "no source", mode: corev1.PersistentVolumeBlock, event: "Warning SourceNotFound",
			claim: func(c *corev1.PersistentVolumeClaim) { c.Spec.DataSourceRef.Name = "typo" }},
		{name: "a backup that is not there", mode: corev1.PersistentVolumeBlock, event: "Warning SourceNotFound",
			claim: func(c *corev1.PersistentVolumeClaim) { c.Spec.DataSourceRef.Kind = kindVolumeBackup }},
		{name: "a kind that is not ours", mode: corev1.PersistentVolumeBlock, event: "Warning SourceNotFound",
			claim: func(c *corev1.PersistentVolumeClaim) { c.Spec.DataSourceRef.Kind = "BackupPolicy" }},
		{name: "a namespace", mode: corev1.PersistentVolumeBlock, event: "Warning NamespaceInDataSourceRef",
			claim: func(c *corev1.PersistentVolumeClaim) { ns := "other"; c.Spec.DataSourceRef.Namespace = &ns }},
		{name: "no class", mode: corev1.PersistentVolumeBlock, event: "Warning NoStorageClass",
			claim: func(c *corev1.PersistentVolumeClaim) { c.Spec.StorageClassName = nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newClaim(tc.mode, "fast")
			if tc.claim != nil {
				tc.claim(c)
			}
			w := newWorld(t, c)
			if tc.world != nil {
				tc.world(w)
			}
			in := w.start(nil)
			in.turns(t, 5)
			if c := w.claim(); c.Spec.VolumeName != "" || len(c.Finalizers) > 1 || len(w.leftovers()) > 0 || len(w.disks) > 0 {
				t.Errorf("something was made: %s", w.dump())
			}
			if !w.hasEvent(tc.event) {
				t.Errorf("events: %q", w.events)
			}
			// The obstacle goes away.
			if tc.world != nil {
				w.point.VolumeMode, w.point.RequestBytes, w.point.Stream, w.findErr = tc.mode, diskSize, false, nil
				in.run(t, w.settled)
			}
		})
	}
}

func TestIfNone(t *testing.T) {
	none := &RefusedError{Reason: v1alpha1.ReasonNoRecoveryPoint, Message: "none", NoneAtAll: true}
	notThat := &RefusedError{Reason: v1alpha1.ReasonNoRecoveryPoint, Message: "none so old"}
	for _, tc := range []struct {
		name   string
		ifNone v1alpha1.IfNone
		err    error
		event  string
		bound  bool
	}{
		{"wait", v1alpha1.IfNoneWait, none, "Normal NoRecoveryPoint", false},
		{"empty", v1alpha1.IfNoneEmpty, none, "Normal Populated", true},
		{"empty but unreachable", v1alpha1.IfNoneEmpty, errors.New("no route to host"), "Warning RepositoryUnreachable", false},
		{"empty but refused", v1alpha1.IfNoneEmpty, &RefusedError{Reason: v1alpha1.ReasonNotGranted, Message: "no"}, "Warning NotGranted", false},
		{"empty but it has others", v1alpha1.IfNoneEmpty, notThat, "Warning NoRecoveryPoint", false},
		{"empty but of another mode", v1alpha1.IfNoneEmpty, nil, "Warning VolumeModeMismatch", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, newClaim(corev1.PersistentVolumeFilesystem, "fast"))
			var rs v1alpha1.RecoverySource
			key := client.ObjectKey{Namespace: userNS, Name: "last"}
			w.must(w.c.Get(t.Context(), key, &rs))
			rs.Spec.IfNone = tc.ifNone
			w.must(w.c.Update(t.Context(), &rs))
			w.findErr = tc.err
			w.start(nil).turns(t, 12)
			if got := w.settled(); got != tc.bound || !w.hasEvent(tc.event) {
				t.Errorf("bound %v, want %v; %s", got, tc.bound, w.dump())
			}
			if tc.bound {
				pv := list(w, &corev1.PersistentVolumeList{}).Items[0]
				if pv.Annotations[AnnotationPopulatedFrom] != "empty" || pvMode(&pv) != corev1.PersistentVolumeFilesystem {
					t.Errorf("volume %+v", pv)
				}
			}
		})
	}
}

// TestGuard lets another controller bind the claim: before it was decided, and after.
func TestGuard(t *testing.T) {
	for i := range 24 {
		mode, rounds := bothModes[i%2], i/2
		w := newWorld(t, newClaim(mode, "fast"))
		w.point.VolumeMode = mode
		in := w.start(nil)
		for range rounds {
			in.round(t)
			w.turn()
		}
		if w.claim().Spec.VolumeName != "" {
			continue // ours is there already
		}
		w.disks["theirs"] = pointID
		w.must(w.c.Create(t.Context(), &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "theirs"}, Spec: corev1.PersistentVolumeSpec{
			Capacity: corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(diskSize, resource.BinarySI)}, VolumeMode: &mode,
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			ClaimRef:                      &corev1.ObjectReference{Namespace: userNS, Name: "data", UID: w.claim().UID},
			PersistentVolumeSource:        corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{VolumeHandle: "theirs"}}}}))
		w.bindFirst("theirs")
		in.run(t, func() bool { return w.hasEvent("Warning BoundWithoutVarve") && w.settled() })
		if c := w.claim(); c.Spec.VolumeName != "theirs" {
			t.Errorf("claim is bound to %s", c.Spec.VolumeName)
		}
	}
}

// bindFirst binds the claim to a volume before the binder considers others.
func (w *world) bindFirst(name string) {
	c := w.claim()
	c.Spec.VolumeName, c.Status.Phase = name, corev1.ClaimBound
	w.put(c)
	w.bind()
}

package replace

import (
	"encoding/json"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
)

// Manifest returns what is needed to create a PersistentVolume again, under a name and with
// policy Retain: labels, annotations and spec, without finalizers, which their owners add,
// and without what only this object has.
func Manifest(pv *corev1.PersistentVolume, name string) *corev1.PersistentVolume {
	out := &corev1.PersistentVolume{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolume"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: maps.Clone(pv.Labels), Annotations: maps.Clone(pv.Annotations)},
		Spec:       *pv.Spec.DeepCopy(),
	}
	for _, k := range []string{annBoundByController, AnnotationKeepUntil, AnnotationKeptPolicy, corev1.LastAppliedConfigAnnotation} {
		delete(out.Annotations, k)
	}
	delete(out.Labels, LabelKept)
	out.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
	if out.Spec.ClaimRef != nil {
		out.Spec.ClaimRef.ResourceVersion = ""
	}
	return out
}

// Member describes a claim whose PersistentVolume old is replaced by pv, a manifest whose
// storage volume is on source until then. The caller adds SourceClaim and Keep.
func Member(claim *corev1.PersistentVolumeClaim, old, pv *corev1.PersistentVolume, policy corev1.PersistentVolumeReclaimPolicy, source string) (v1alpha1.ReplacedVolume, error) {
	m := v1alpha1.ReplacedVolume{
		Claim:  v1alpha1.ClaimReference{Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID},
		Volume: old.Name, OldPolicy: old.Spec.PersistentVolumeReclaimPolicy, NewPolicy: policy, Source: source,
	}
	pv = Manifest(pv, old.Name)
	pv.Spec.ClaimRef = claimRef(m.Claim)
	before, err := json.Marshal(Manifest(old, old.Name))
	if err != nil {
		return m, fmt.Errorf("manifest of volume %s: %w", old.Name, err)
	}
	after, err := json.Marshal(pv)
	if err != nil {
		return m, fmt.Errorf("manifest of the volume that replaces %s: %w", old.Name, err)
	}
	m.Old, m.New = string(before), string(after)
	return m, nil
}

func claimRef(c v1alpha1.ClaimReference) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: c.Namespace, Name: c.Name, UID: c.UID}
}

// read decodes a member's manifests and checks that they are as Member makes them:
// objects created from them are for that claim, and delete nothing.
func read(m *v1alpha1.ReplacedVolume) (*member, error) {
	out := &member{ReplacedVolume: m, old: &corev1.PersistentVolume{}, new: &corev1.PersistentVolume{}}
	for _, d := range []struct {
		text string
		pv   *corev1.PersistentVolume
	}{{m.Old, out.old}, {m.New, out.new}} {
		if err := json.Unmarshal([]byte(d.text), d.pv); err != nil {
			return nil, fmt.Errorf("manifest of volume %s: %w", m.Volume, err)
		}
		ref := d.pv.Spec.ClaimRef
		if d.pv.Name != m.Volume || ref == nil || ref.UID != m.Claim.UID || len(d.pv.Finalizers) > 0 ||
			d.pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain {
			return nil, fmt.Errorf("manifest of volume %s is not one of a volume of claim %s/%s that is retained", m.Volume, m.Claim.Namespace, m.Claim.Name)
		}
	}
	if handle(out.old) == "" || handle(out.new) == "" {
		return nil, fmt.Errorf("volume %s is not of a CSI driver", m.Volume)
	}
	if handle(out.old) == handle(out.new) {
		return nil, fmt.Errorf("volume %s would be replaced by itself", m.Volume)
	}
	return out, nil
}

// handle names a storage volume among all drivers; empty if it has no CSI driver.
func handle(pv *corev1.PersistentVolume) string {
	if pv.Spec.CSI == nil {
		return ""
	}
	return pv.Spec.CSI.Driver + "^" + pv.Spec.CSI.VolumeHandle
}

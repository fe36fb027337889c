package claims

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
)

// applied is a claim's annotation as kubectl apply writes it, with a spec.
func applied(spec string) string {
	return fmt.Sprintf(`{"apiVersion":"v1","kind":"PersistentVolumeClaim","metadata":{"annotations":{},"name":"data","namespace":%q},"spec":%s}`, userNS, spec)
}

const appliedRef = `{"accessModes":["ReadWriteOnce"],"dataSourceRef":{"apiGroup":"varve.io","kind":"RecoverySource","name":"last","namespace":"other"}}`

// bare is a claim without a reference, as the API server stores it after dropping one.
func bare(annotation string) *corev1.PersistentVolumeClaim {
	c := newClaim(corev1.PersistentVolumeFilesystem, "wffc")
	c.Spec.DataSourceRef = nil
	metav1.SetMetaDataAnnotation(&c.ObjectMeta, corev1.LastAppliedConfigAnnotation, annotation)
	return c
}

func TestDropped(t *testing.T) {
	for name, tc := range map[string]struct {
		annotation string
		dropped    bool
	}{
		"none":                 {"", false},
		"another namespace":    {applied(appliedRef), true},
		"an empty namespace":   {applied(strings.Replace(appliedRef, "other", "", 1)), true},
		"of others":            {applied(strings.Replace(appliedRef, "varve.io", "other.io", 1)), false},
		"of a similar group":   {applied(strings.Replace(appliedRef, "varve.io", "varve.io.example", 1)), false},
		"no group":             {applied(`{"dataSourceRef":{"kind":"RecoverySource","name":"varve.io"}}`), false},
		"no reference":         {applied(`{"storageClassName":"varve.io"}`), false},
		"null":                 {applied(`{"dataSourceRef":null,"volumeName":"varve.io"}`), false},
		"another type":         {applied(`{"dataSourceRef":["varve.io"]}`), false},
		"spec of another type": {applied(`"varve.io"`), false},
		"no JSON":              {"varve.io", false},
		"JSON and more":        {applied(appliedRef) + "x", false},
		"deep":                 {applied(`{"varve.io":` + strings.Repeat(`[`, 100_000) + `}`), false},
		"large":                {applied(`{"x":"` + strings.Repeat("y", maxApplied) + `",` + appliedRef[1:]), false},
	} {
		c := bare(tc.annotation)
		if got := Dropped(c); (got != nil) != tc.dropped {
			t.Errorf("%s: %+v", name, got)
		}
		if concerns(c) != tc.dropped || Means(c) != tc.dropped {
			t.Errorf("%s: concerns %v, means %v", name, concerns(c), Means(c))
		}
		// A claim that has a reference did not lose it.
		c.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: "other"}
		if got := Dropped(c); got != nil {
			t.Errorf("%s, of a claim with a source: %+v", name, got)
		}
	}
}

// Without the admission policy, an event tells the claim's user what the API server did.
func TestDroppedReferenceIsTold(t *testing.T) {
	bound := func(annotations map[string]string) *world {
		c := bare(applied(appliedRef))
		c.Spec.VolumeName, c.Status.Phase = "theirs", corev1.ClaimBound
		w := newWorld(t, c)
		w.point.ID = "" // so it holds nothing
		w.disks["theirs"] = ""
		w.must(w.c.Create(t.Context(), &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "theirs", Annotations: annotations}, Spec: corev1.PersistentVolumeSpec{
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			PersistentVolumeSource:        corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{VolumeHandle: "theirs"}}}}))
		return w
	}
	for name, tc := range map[string]struct {
		w    *world
		said string
		lost float64
	}{
		"pending":          {newWorld(t, bare(applied(appliedRef))), "Warning " + v1alpha1.ReasonNamespaceInReference, 0},
		"bound":            {bound(nil), "Warning " + v1alpha1.ReasonBoundWithoutUs, 1},
		"bound and in use": {bound(map[string]string{AnnotationPopulatedFrom: "checked"}), "", 0},
		"another's":        {newWorld(t, bare(applied(`{}`))), "", 0},
	} {
		in := tc.w.start(nil)
		for range 3 {
			in.round(t)
		}
		switch {
		case tc.said == "" && len(tc.w.events) > 0, tc.said != "" && (len(tc.w.events) != 1 || !strings.HasPrefix(tc.w.events[0], tc.said)):
			t.Errorf("%s: the events are %q, want %q", name, tc.w.events, tc.said)
		case tc.w.counter("varve_claims_bound_without_varve_total") != tc.lost:
			t.Errorf("%s: varve_claims_bound_without_varve_total is %v", name, tc.w.counter("varve_claims_bound_without_varve_total"))
		case len(tc.w.leftovers()) > 0:
			t.Errorf("%s: something was made of an annotation: %s", name, tc.w.dump())
		}
	}
}

// Every writer of a claim can set the annotation.
func FuzzAppliedReference(f *testing.F) {
	for _, s := range []string{applied(appliedRef), applied(`{"dataSourceRef":null}`), `{"spec":{"dataSourceRef":{"apiGroup":"varve.io"}}}`, `{"spec":"varve.io"}`, "varve.io", "[[[["} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ref := appliedReference(text)
		if ref != nil && *ref.APIGroup != v1alpha1.GroupVersion.Group {
			t.Errorf("%q names %+v", text, ref)
		}
		c := bare(text)
		if Dropped(c) != nil != concerns(c) {
			t.Errorf("%q is dropped and does not concern Varve, or the other way round", text)
		}
	})
}

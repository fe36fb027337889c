package claims

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// keyClass names the same Secret for all claims, each in its own namespace.
func keyClass(binding storagev1.VolumeBindingMode) *storagev1.StorageClass {
	return &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "keys"}, Provisioner: "csi", VolumeBindingMode: &binding, Parameters: map[string]string{
		"csi.storage.k8s.io/node-stage-secret-name": "key", "csi.storage.k8s.io/node-stage-secret-namespace": "${pvc.namespace}"}}
}

func key(namespace, content string, labels map[string]string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "key", UID: types.UID(namespace + content), Labels: labels},
		Data: map[string][]byte{"key": []byte(content)}}
}

func population(claim, namespace string) *v1alpha1.VolumePopulation {
	return &v1alpha1.VolumePopulation{
		ObjectMeta: metav1.ObjectMeta{Namespace: varveNS, Name: PopulationName(types.UID(claim)), UID: types.UID("of-" + claim)},
		Spec: v1alpha1.VolumePopulationSpec{StorageClassName: "keys",
			Claim: v1alpha1.ClaimReference{Namespace: namespace, Name: "data", UID: types.UID(claim)}},
	}
}

// of returns a population in progress.
func (in *incarnation) of(pop *v1alpha1.VolumePopulation) *job {
	claim := newClaim(corev1.PersistentVolumeBlock, "keys")
	claim.Namespace, claim.UID = pop.Spec.Claim.Namespace, pop.Spec.Claim.UID
	return &job{Populations: in.po, pop: pop, claim: claim, prime: client.ObjectKey{Namespace: varveNS, Name: PrimePrefix + string(claim.UID)}}
}

// copied returns the content of the Secret in Varve's namespace; empty if there is none.
func (w *world) copied() string {
	w.t.Helper()
	var s corev1.Secret
	err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: varveNS, Name: "key"}, &s)
	w.must(err)
	if apierrors.IsNotFound(err) {
		return ""
	}
	return string(s.Data["key"])
}

// A Secret of Varve's namespace with the name of a copy is neither used nor deleted.
func TestSecretOfSomebodyElse(t *testing.T) {
	w := newWorld(t, newClaim(corev1.PersistentVolumeBlock, "keys"), keyClass(storagev1.VolumeBindingImmediate),
		key(userNS, "tenant", nil), key(varveNS, "password", nil))
	in := w.start(nil)
	in.turns(t, 10)
	if !w.hasEvent("Warning TenantSecrets") || len(w.disks) > 0 || w.claim().Spec.VolumeName != "" {
		t.Errorf("%s", w.dump())
	}
	if err := w.c.Delete(t.Context(), w.claim()); err != nil {
		t.Fatal(err)
	}
	in.turns(t, 10)
	if w.claim() != nil || len(list(w, &v1alpha1.VolumePopulationList{}).Items) > 0 {
		t.Errorf("not at its end: %s", w.dump())
	}
	if got := w.copied(); got != "password" {
		t.Errorf("the Secret holds %q now", got)
	}
}

// Two restores whose Secrets would have the same name come one after the other, each with
// its own.
func TestSecretsOfTwoTenants(t *testing.T) {
	first, second := population("aaaa", userNS), population("bbbb", "bank")
	w := newWorld(t, first, second, keyClass(storagev1.VolumeBindingImmediate), key(userNS, "shop's", nil), key("bank", "bank's", nil))
	in := w.start(nil)
	a, b := in.of(first), in.of(second)
	secrets := func(j *job) step.Result {
		t.Helper()
		res, err := j.secretsStep(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	if !secrets(a).IsDone() || w.copied() != "shop's" {
		t.Fatalf("the first was not copied: %q", w.copied())
	}
	if secrets(b).IsDone() || w.copied() != "shop's" || !w.hasEvent("Normal TenantSecrets") {
		t.Fatalf("the second did not wait; %q; %v", w.copied(), w.events)
	}
	if err := b.dropSecrets(t.Context()); err != nil || w.copied() != "shop's" {
		t.Fatalf("the second deleted the first one's: %v", err)
	}
	if err := a.dropSecrets(t.Context()); err != nil || w.copied() != "" {
		t.Fatalf("the first did not delete its own: %v", err)
	}
	if !secrets(b).IsDone() || w.copied() != "bank's" {
		t.Errorf("the second was not copied: %q", w.copied())
	}
	w.must(w.c.Delete(t.Context(), second)) // and left its copy
	if secrets(a).IsDone() || !secrets(a).IsDone() || w.copied() != "shop's" {
		t.Errorf("what was left behind is in the way: %q", w.copied())
	}
}

// A copy follows its Secret.
func TestSecretChanges(t *testing.T) {
	pop, secret := population("aaaa", userNS), key(userNS, "old", nil)
	w := newWorld(t, pop, secret, keyClass(storagev1.VolumeBindingImmediate))
	j := w.start(nil).of(pop)
	for _, content := range []string{"old", "new"} {
		secret.Data["key"] = []byte(content)
		w.must(w.c.Update(t.Context(), secret))
		if res, err := j.secretsStep(t.Context()); err != nil || !res.IsDone() || w.copied() != content {
			t.Errorf("%q was copied, not %q: %v", w.copied(), content, err)
		}
	}
}

// While no pod uses the claim, the name of the copy is left to claims in use.
func TestSecretsWaitForConsumer(t *testing.T) {
	pop := population("aaaa", userNS)
	w := newWorld(t, pop, key(userNS, "tenant", nil), keyClass(storagev1.VolumeBindingWaitForFirstConsumer))
	j := w.start(nil).of(pop)
	if res, err := j.secretsStep(t.Context()); err != nil || res.Reason != v1alpha1.ReasonWaitingForConsumer || w.copied() != "" {
		t.Errorf("%+v, %v, %q", res, err, w.copied())
	}
	metav1.SetMetaDataAnnotation(&j.claim.ObjectMeta, annSelectedNode, "n1")
	if res, err := j.secretsStep(t.Context()); err != nil || !res.IsDone() || w.copied() != "tenant" {
		t.Errorf("%+v, %v, %q", res, err, w.copied())
	}
}

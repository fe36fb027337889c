package claims

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

// secretKinds are the Secrets that a storage class can name, by the prefix of the
// parameters, as the external-provisioner reads them (its README, "Secrets").
var secretKinds = []string{"provisioner", "controller-publish", "node-stage", "node-publish", "controller-expand", "node-expand"}

// template is a class's reference to a Secret that differs between claims.
type template struct{ kind, name, namespace string }

// templated returns the references of a class that name the claim or its namespace.
func templated(class *storagev1.StorageClass) []template {
	var out []template
	for _, kind := range secretKinds {
		t := template{kind, class.Parameters["csi.storage.k8s.io/"+kind+"-secret-name"], class.Parameters["csi.storage.k8s.io/"+kind+"-secret-namespace"]}
		if strings.Contains(t.name+t.namespace, "${") {
			out = append(out, t)
		}
	}
	return out
}

// resolve returns the reference for a claim; ok is false if it needs more than a claim's
// name and namespace.
func (t template) resolve(claim client.ObjectKey) (key client.ObjectKey, ok bool) {
	fill := strings.NewReplacer("${pvc.name}", claim.Name, "${pvc.namespace}", claim.Namespace)
	key = client.ObjectKey{Name: fill.Replace(t.name), Namespace: fill.Replace(t.namespace)}
	return key, !strings.Contains(key.Name+key.Namespace, "${")
}

// secretsStep copies the Secrets that the storage reads from the claim's namespace to
// where it looks for those of our claim.
func (j *job) secretsStep(ctx context.Context) (step.Result, error) {
	if inPlace(j.pop) { // its volume has the references of the claim's volume
		return step.Done(), nil
	}
	class, err := j.class(ctx)
	if err != nil {
		return step.Result{}, err
	}
	claim := client.ObjectKey{Namespace: j.pop.Spec.Claim.Namespace, Name: j.pop.Spec.Claim.Name}
	sources := map[client.ObjectKey]client.ObjectKey{}
	for _, t := range templated(class) {
		from, ok1 := t.resolve(claim)
		to, ok2 := t.resolve(j.prime)
		source, twice := sources[to]
		sources[to] = from
		switch {
		case !ok1 || !ok2:
			return step.Result{}, step.Terminal(v1alpha1.ReasonTenantSecrets, fmt.Errorf(
				"storage class %s names its %s Secret %s/%s, which Varve cannot resolve for a volume it makes; use a class that names Secrets by ${pvc.name} or ${pvc.namespace} at most",
				class.Name, t.kind, t.namespace, t.name))
		case from == to:
			continue
		case to.Namespace != j.Namespace:
			return step.Result{}, step.Terminal(v1alpha1.ReasonTenantSecrets, fmt.Errorf(
				"storage class %s names a %s Secret for each claim in namespace %s, where Varve makes none; use a class that keeps them in ${pvc.namespace}",
				class.Name, t.kind, to.Namespace))
		case twice && source != from:
			return step.Result{}, step.Terminal(v1alpha1.ReasonTenantSecrets, fmt.Errorf(
				"storage class %s names two Secrets, %s and %s, that would have the same name for a volume Varve makes; use a class that gives them names of their own",
				class.Name, source, from))
		case j.pop.Spec.Restore == nil && waitsForConsumer(class) && j.claim.Annotations[annSelectedNode] == "":
			// Others may wait for the copy's name.
			return waitForConsumer(), nil
		}
		if res, err := j.copySecret(ctx, class.Name, from, to); err != nil || !res.IsDone() {
			return res, err
		}
	}
	return step.Done(), nil
}

func (j *job) copySecret(ctx context.Context, class string, from, to client.ObjectKey) (step.Result, error) {
	var secret corev1.Secret
	switch err := j.Live.Get(ctx, from, &secret); {
	case apierrors.IsForbidden(err):
		j.warn(v1alpha1.ReasonTenantSecrets, fmt.Sprintf(
			"storage class %s takes Secret %s of this namespace, which Varve may not read; an administrator allows it with: kubectl create rolebinding varve-tenant-secrets -n %s --clusterrole=varve-tenant-secrets --serviceaccount=%s:varve-controller",
			class, from.Name, from.Namespace, j.Namespace))
		return step.Wait(v1alpha1.ReasonTenantSecrets, fmt.Sprintf("Varve may not read Secret %s", from), retryMissing), nil
	case apierrors.IsNotFound(err):
		j.warn(v1alpha1.ReasonTenantSecrets, fmt.Sprintf("storage class %s takes Secret %s, which does not exist", class, from))
		return step.Wait(v1alpha1.ReasonTenantSecrets, fmt.Sprintf("Secret %s does not exist", from), retryMissing), nil
	case err != nil:
		return step.Result{}, fmt.Errorf("read Secret %s: %w", from, err)
	}
	return j.placeCopy(ctx, class, &secret, to)
}

// placeCopy writes a Secret under another name. That name may be taken: a class can name
// the same one for all claims, and Varve's namespace also has Secrets of others.
func (j *job) placeCopy(ctx context.Context, class string, secret *corev1.Secret, to client.ObjectKey) (step.Result, error) {
	var there corev1.Secret
	err := j.Live.Get(ctx, to, &there)
	if apierrors.IsNotFound(err) {
		twin := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: to.Namespace, Name: to.Name, Labels: j.labels(),
			Annotations: map[string]string{AnnotationClaim: j.claimName()}}, Type: secret.Type, Data: secret.Data}
		err = j.Client.Create(ctx, twin)
		if err == nil {
			return step.Done(), nil
		}
	}
	switch {
	case apierrors.IsAlreadyExists(err): // somebody was faster
		return step.Wait(v1alpha1.ReasonTenantSecrets, "waiting to copy Secret "+secret.Name, look/2), nil
	case err != nil:
		return step.Result{}, fmt.Errorf("copy Secret %s/%s to %s: %w", secret.Namespace, secret.Name, to, err)
	case !j.made(&there):
		return j.nameTaken(ctx, class, &there)
	case there.Type != secret.Type: // which cannot be changed
		return step.Wait(v1alpha1.ReasonTenantSecrets, "waiting for an earlier copy of Secret "+secret.Name+" to be gone", look/2), j.deleteCopy(ctx, &there)
	case !maps.EqualFunc(there.Data, secret.Data, bytes.Equal):
		there.Data = secret.Data
		if err := j.Client.Update(ctx, &there); err != nil {
			return step.Result{}, fmt.Errorf("copy Secret %s/%s to %s again: %w", secret.Namespace, secret.Name, to, err)
		}
	}
	return step.Done(), nil
}

// made reports whether a Secret is a copy of this population's.
func (j *job) made(secret *corev1.Secret) bool {
	for k, v := range j.labels() {
		if secret.Labels[k] != v {
			return false
		}
	}
	return true
}

// nameTaken handles a copy's name that a Secret not made by this population has: another
// population's will be deleted, any other is left.
func (j *job) nameTaken(ctx context.Context, class string, secret *corev1.Secret) (step.Result, error) {
	name := secret.Labels[LabelPopulation]
	if secret.Labels[LabelManagedBy] != managedBy || name == "" {
		return step.Result{}, step.Terminal(v1alpha1.ReasonTenantSecrets, fmt.Errorf(
			"storage class %s takes Secret %s of each claim's namespace, and in Varve's namespace that is the name of a Secret that is no copy; use a class that names Secrets by ${pvc.name}",
			class, secret.Name))
	}
	var other v1alpha1.VolumePopulation
	err := j.Live.Get(ctx, client.ObjectKey{Namespace: j.Namespace, Name: name}, &other)
	switch {
	case client.IgnoreNotFound(err) != nil:
		return step.Result{}, fmt.Errorf("read whose copy Secret %s is: %w", secret.Name, err)
	case err != nil || string(other.UID) != secret.Labels[mover.LabelRun]: // it was left behind
		return step.Wait(v1alpha1.ReasonTenantSecrets, "waiting for an old copy of a Secret to be gone", look/2), j.deleteCopy(ctx, secret)
	}
	message := fmt.Sprintf("storage class %s takes a Secret of the same name, %s, for all claims: waiting until another restore that uses it has ended", class, secret.Name)
	j.tell(v1alpha1.ReasonTenantSecrets, message)
	return step.Wait(v1alpha1.ReasonTenantSecrets, message, look), nil
}

// dropSecrets deletes the copies. Their names follow from the class, since Varve may not
// list Secrets; it leaves a Secret of such a name that is not this population's.
func (j *job) dropSecrets(ctx context.Context) error {
	names, err := j.copied(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		var secret corev1.Secret
		err := j.Live.Get(ctx, client.ObjectKey{Namespace: j.Namespace, Name: name}, &secret)
		if client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("read Secret %s: %w", name, err)
		}
		if err != nil || !j.made(&secret) {
			continue
		}
		if err := j.deleteCopy(ctx, &secret); err != nil {
			return err
		}
	}
	return nil
}

// deleteCopy deletes a Secret as it was read, not one that replaced it.
func (j *job) deleteCopy(ctx context.Context, secret *corev1.Secret) error {
	err := j.Client.Delete(ctx, secret, client.Preconditions{UID: &secret.UID, ResourceVersion: &secret.ResourceVersion})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete Secret %s: %w", secret.Name, err)
	}
	return nil
}

// copied returns the names of the copies that may exist.
func (j *job) copied(ctx context.Context) ([]string, error) {
	name := j.pop.Spec.StorageClassName
	if name == "" {
		return nil, nil
	}
	var class storagev1.StorageClass
	if err := j.Live.Get(ctx, client.ObjectKey{Name: name}, &class); err != nil {
		return nil, client.IgnoreNotFound(err)
	}
	claim := client.ObjectKey{Namespace: j.pop.Spec.Claim.Namespace, Name: j.pop.Spec.Claim.Name}
	names := map[string]bool{}
	for _, t := range templated(&class) {
		from, _ := t.resolve(claim)
		if to, ok := t.resolve(j.prime); ok && to.Namespace == j.Namespace && from != to {
			names[to.Name] = true
		}
	}
	return slices.Sorted(maps.Keys(names)), nil
}

// rewriteSecrets makes a new volume name the Secrets of the user's claim where the old
// one names the copies.
func (j *job) rewriteSecrets(class *storagev1.StorageClass, pv *corev1.PersistentVolume) error {
	claim := client.ObjectKey{Namespace: j.pop.Spec.Claim.Namespace, Name: j.pop.Spec.Claim.Name}
	for _, t := range templated(class) {
		to, ok := t.resolve(claim)
		if !ok {
			return fmt.Errorf("storage class %s changed its %s Secret during the restore", class.Name, t.kind)
		}
		if t.kind == "provisioner" {
			pv.Annotations[annDeletionSecretName], pv.Annotations[annDeletionSecretNS] = to.Name, to.Namespace

			continue
		}
		if pv.Spec.CSI == nil {
			continue
		}
		ref := map[string]**corev1.SecretReference{
			"controller-publish": &pv.Spec.CSI.ControllerPublishSecretRef, "node-stage": &pv.Spec.CSI.NodeStageSecretRef,
			"node-publish": &pv.Spec.CSI.NodePublishSecretRef, "controller-expand": &pv.Spec.CSI.ControllerExpandSecretRef,
			"node-expand": &pv.Spec.CSI.NodeExpandSecretRef,
		}[t.kind]
		if *ref != nil {
			*ref = &corev1.SecretReference{Name: to.Name, Namespace: to.Namespace}
		}
	}
	return nil
}

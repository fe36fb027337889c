package mover

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/populator/store"
)

// EnsureSecret returns the name of the Secret in Varve's namespace that a mover of the store
// mounts: a BackupStore's own, or a copy of a Repository's, made for one run under the given
// name; delete it with the run.
func EnsureSecret(ctx context.Context, c client.Client, stores *store.Stores, st *store.Store, namespace, name string, labels, annotations map[string]string) (string, error) {
	data, err := stores.Credentials(ctx, st)
	if err != nil {
		return "", err
	}
	if st.SecretNamespace == namespace {
		return st.Spec.CredentialsSecretRef.Name, nil
	}
	s := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels, Annotations: annotations},
		Type:       corev1.SecretTypeOpaque, Data: data,
	}
	err = c.Create(ctx, s)
	if apierrors.IsAlreadyExists(err) {
		// Its credentials may have changed: another attempt uses the new ones.
		err = c.Update(ctx, s)
	}
	if err != nil {
		return "", fmt.Errorf("copy the credentials of %s for its mover: %w", st.Key, err)
	}
	return name, nil
}

package store

import (
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/varve-io/varve/api/v1alpha1"
)

// A Repository's Secret is its tenant's; the other rights of Varve's pods are not.
func TestCredentialsOfTenants(t *testing.T) {
	s3 := v1alpha1.Storage{S3: &v1alpha1.S3Storage{Bucket: "b"}}
	gcs := v1alpha1.Storage{GCS: &v1alpha1.GCSStorage{Bucket: "b"}}
	nip := v1alpha1.Storage{Azure: &v1alpha1.AzureStorage{Container: "c", Account: "abc", Domain: "127.0.0.1.nip.io:8081"}}
	slash := v1alpha1.Storage{Azure: &v1alpha1.AzureStorage{Container: "c", Account: "127.0.0.1:8081/x"}}
	azure := v1alpha1.Storage{Azure: &v1alpha1.AzureStorage{Container: "c", Account: "abc"}}
	for _, tc := range []struct {
		name   string
		spec   v1alpha1.RepositorySpec
		secret map[string]string
		want   error // for the Repository; a BackupStore may
	}{
		{"keys of its own", v1alpha1.RepositorySpec{Storage: s3}, map[string]string{"accessKeyID": "a", "secretAccessKey": "s"}, nil},
		{"the pod's identity", v1alpha1.RepositorySpec{Storage: s3}, nil, ErrCredentials},
		{"half a key", v1alpha1.RepositorySpec{Storage: s3}, map[string]string{"accessKeyID": "a", "secretAccessKey": "\n"}, ErrCredentials},
		{"a service account of Varve's namespace", v1alpha1.RepositorySpec{Storage: s3, ServiceAccountName: "varve-controller"}, map[string]string{"accessKeyID": "a", "secretAccessKey": "s"}, ErrSpec},
		{"a claim of Varve's namespace", v1alpha1.RepositorySpec{Storage: v1alpha1.Storage{Volume: &v1alpha1.VolumeStorage{ClaimName: "nfs"}}}, nil, ErrSpec},
		{"a program", v1alpha1.RepositorySpec{Storage: v1alpha1.Storage{Rclone: &v1alpha1.RcloneStorage{RemotePath: "x:y"}}}, nil, ErrSpec},
		{"Google key", v1alpha1.RepositorySpec{Storage: gcs}, map[string]string{"credentials.json": `{"type":"service_account"}`}, nil},
		{"Google key that asks elsewhere for tokens", v1alpha1.RepositorySpec{Storage: gcs}, map[string]string{"credentials.json": `{"type":"service_account","token_uri":"http://127.0.0.1:8081/healthz"}`}, ErrCredentials},
		{"Google key of another universe", v1alpha1.RepositorySpec{Storage: gcs}, map[string]string{"credentials.json": `{"type":"service_account","universe_domain":"127.0.0.1.nip.io"}`}, ErrCredentials},
		{"Google key as Google writes it", v1alpha1.RepositorySpec{Storage: gcs}, map[string]string{"credentials.json": `{"type":"service_account","token_uri":"https://oauth2.googleapis.com/token","universe_domain":"googleapis.com"}`}, nil},
		{"Azure at another domain", v1alpha1.RepositorySpec{Storage: nip}, map[string]string{"sasToken": "t"}, ErrSpec},
		{"Azure with an account that is a host", v1alpha1.RepositorySpec{Storage: slash}, map[string]string{"sasToken": "t"}, ErrSpec},
		{"Google key that names a file", v1alpha1.RepositorySpec{Storage: gcs}, map[string]string{"credentials.json": `{"type":"external_account","credential_source":{"file":"/var/run/secrets/token"}}`}, ErrCredentials},
		{"Google key that is none", v1alpha1.RepositorySpec{Storage: gcs}, map[string]string{"credentials.json": "s3cr3t"}, ErrCredentials},
		{"Google without", v1alpha1.RepositorySpec{Storage: gcs}, nil, ErrCredentials},
		{"Azure key", v1alpha1.RepositorySpec{Storage: azure}, map[string]string{"sasToken": "t"}, nil},
		{"Azure without", v1alpha1.RepositorySpec{Storage: azure}, nil, ErrCredentials},
		{"SFTP", v1alpha1.RepositorySpec{Storage: v1alpha1.Storage{SFTP: &v1alpha1.SFTPStorage{}}}, map[string]string{"privateKey": "k"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			scheme := runtime.NewScheme()
			if err := errors.Join(corev1.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
				t.Fatal(err)
			}
			secret := func(ns string) *corev1.Secret {
				s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "creds"}, Data: map[string][]byte{KeyPassword: []byte("p")}}
				for k, v := range tc.secret {
					s.Data[k] = []byte(v)
				}
				return s
			}
			c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(secret("shop"), secret("varve")).Build()
			stores := &Stores{Client: c, Secrets: c, Namespace: "varve"}
			tc.spec.CredentialsSecretRef.Name = "creds"
			_, err := stores.Credentials(t.Context(), stores.FromRepository(&v1alpha1.Repository{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "own"}, Spec: tc.spec}))
			if tc.want == nil && err != nil || !errors.Is(err, tc.want) {
				t.Errorf("Repository: %v, want %v", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), "s3cr3t") {
				t.Errorf("the error has the secret in it: %v", err)
			}
			if _, err := stores.Credentials(t.Context(), stores.FromBackupStore(&v1alpha1.BackupStore{Spec: v1alpha1.BackupStoreSpec{RepositorySpec: tc.spec}})); err != nil {
				t.Errorf("BackupStore: %v", err)
			}
		})
	}
}

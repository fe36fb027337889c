package store

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/varve-io/varve/api/v1alpha1"
)

// checkTenant refuses what a tenant's Repository must not have Varve's pods do for it. A
// Repository and its Secret are written by whoever may edit a namespace; the controller and
// its movers have an identity in the cloud, files, and claims that are not that tenant's. So a
// Repository brings credentials of its own, and none that name a file or a program.
func checkTenant(spec v1alpha1.RepositorySpec, c Credentials) error {
	st := spec.Storage
	switch {
	case st.Volume != nil:
		return fmt.Errorf("%w: storage.volume is a claim in Varve's namespace: for BackupStores only", ErrSpec)
	case st.Rclone != nil:
		return fmt.Errorf("%w: storage.rclone runs what its configuration says: for BackupStores only", ErrSpec)
	case spec.ServiceAccountName != "":
		return fmt.Errorf("%w: serviceAccountName is of Varve's namespace: for BackupStores only", ErrSpec)
	}
	has := func(keys ...string) bool {
		return !slices.ContainsFunc(keys, func(k string) bool { return c.text(k) == "" })
	}
	own := true
	switch {
	case st.S3 != nil:
		own = has(keyAccessKeyID, keySecretAccessKey)
	case st.GCS != nil:
		if own = has(keyGCSCredentials); own {
			return checkGoogleKey(c[keyGCSCredentials])
		}
	case st.Azure != nil:
		own = has(keyAccountKey) || has(keySASToken) || has(keyClientSecret)
	}
	if !own {
		return fmt.Errorf("%w: a Repository needs credentials of its own in its Secret (kubectl explain repository.spec.storage names the keys); Varve's own identity is for BackupStores", ErrCredentials)
	}

	return nil
}

// googleKeys are the types of Google credentials that are a secret and no more. Those of type
// external_account name a file or a program of the machine and a server to send what it
// holds to (google.golang.org/api/option, WithCredentialsJSON warns of it).
var googleKeys = []string{"service_account", "authorized_user"}

func checkGoogleKey(text []byte) error {
	var key struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(text, &key); err != nil {
		// Its error would quote the key.
		return fmt.Errorf("%w: %s is not JSON", ErrCredentials, keyGCSCredentials)
	}
	if !slices.Contains(googleKeys, key.Type) {
		return fmt.Errorf("%w: %s is of type %q; a Repository takes the key of a service account", ErrCredentials, keyGCSCredentials, key.Type)
	}

	return nil
}

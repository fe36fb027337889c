package store

import (
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/varve-io/varve/api/v1alpha1"
)

// checkTenant refuses what a tenant's Repository must not make Varve's pods do. Every editor
// of a namespace can write a Repository and its Secret; the controller and its movers have a
// cloud identity, files, and claims that are not that tenant's. So a Repository brings its own
// credentials, and none that name a file or a program.
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
		if err := checkAzure(st.Azure); err != nil {
			return err
		}
		own = has(keyAccountKey) || has(keySASToken) || has(keyClientSecret)
	}
	if !own {
		return fmt.Errorf("%w: a Repository needs credentials of its own in its Secret (kubectl explain repository.spec.storage names the keys); Varve's own identity is for BackupStores", ErrCredentials)
	}
	return nil
}

// googleKeys are the types of Google credentials that are only a secret. Those of type
// external_account name a file or a program of the machine and a server to which its content
// is sent (google.golang.org/api/option, WithCredentialsJSON warns of it).
var googleKeys = []string{"service_account", "authorized_user"}

// googleHosts are the hosts that Google writes into token_uri.
var googleHosts = []string{"oauth2.googleapis.com", "accounts.google.com", "www.googleapis.com"}

func checkGoogleKey(text []byte) error {
	var key struct {
		Type     string `json:"type"`
		TokenURI string `json:"token_uri"`
		Universe string `json:"universe_domain"`
	}
	if err := json.Unmarshal(text, &key); err != nil {
		// Its error would quote the key.
		return fmt.Errorf("%w: %s is not JSON", ErrCredentials, keyGCSCredentials)
	}
	if !slices.Contains(googleKeys, key.Type) {
		return fmt.Errorf("%w: %s is of type %q; a Repository takes the key of a service account", ErrCredentials, keyGCSCredentials, key.Type)
	}
	// The library requests the token, and the bucket, from hosts that the key names.
	if u, err := url.Parse(key.TokenURI); err != nil || key.TokenURI != "" && (u.Scheme != "https" || !slices.Contains(googleHosts, u.Host)) ||
		key.Universe != "" && key.Universe != "googleapis.com" {
		return fmt.Errorf("%w: %s names a token_uri or universe_domain that is not Google's own: for BackupStores only", ErrCredentials, keyGCSCredentials)
	}
	return nil
}

// azureDomains are those of Azure's clouds. The host is an account's name followed by one of
// them.
var azureDomains = []string{"", "blob.core.windows.net", "blob.core.usgovcloudapi.net", "blob.core.chinacloudapi.cn"}

var azureAccount = regexp.MustCompile(`^[a-z0-9]{3,24}$`)

func checkAzure(a *v1alpha1.AzureStorage) error {
	switch {
	case !azureAccount.MatchString(a.Account):
		return fmt.Errorf("%w: storage.azure.account %q is not the name of a storage account", ErrSpec, a.Account)
	case !slices.Contains(azureDomains, a.Domain):
		return fmt.Errorf("%w: storage.azure.domain %q is none of Azure's (%s): another one is for BackupStores only", ErrSpec, a.Domain, strings.Join(azureDomains[1:], ", "))
	}
	return nil
}

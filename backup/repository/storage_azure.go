package repository

import (
	"context"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/azure"
)

// Azure keeps the repository in a container of Azure blob storage. It is opened by the
// given account key, SAS token or service principal.
type Azure struct {
	Container string
	Prefix    string
	Account   string
	Domain    string // empty for blob.core.windows.net

	AccountKey string
	SASToken   string

	TenantID           string // of a service principal, with ClientID and one of:
	ClientID           string
	ClientSecret       string
	ClientCertificate  string
	FederatedTokenFile string

	DisableTLS bool
}

func (s *Azure) validate() error {
	switch {
	case s.Container == "":
		return invalid("an Azure repository needs a container")
	case s.Account == "":
		return invalid("an Azure repository needs a storage account")
	}
	principal := s.TenantID != "" && s.ClientID != "" && (s.ClientSecret != "" || s.ClientCertificate != "" || s.FederatedTokenFile != "")
	if s.AccountKey == "" && s.SASToken == "" && !principal {
		return invalid("an Azure repository needs an account key, a SAS token, or tenant ID, client ID and a client secret, certificate or federated token file")
	}
	return nil
}

func (s *Azure) options() *azure.Options {
	return &azure.Options{
		Container:               s.Container,
		Prefix:                  s.Prefix,
		StorageAccount:          s.Account,
		StorageDomain:           s.Domain,
		StorageKey:              s.AccountKey,
		SASToken:                s.SASToken,
		TenantID:                s.TenantID,
		ClientID:                s.ClientID,
		ClientSecret:            s.ClientSecret,
		ClientCertificate:       s.ClientCertificate,
		AzureFederatedTokenFile: s.FederatedTokenFile,
		DoNotUseTLS:             s.DisableTLS,
	}
}

func (s *Azure) open(ctx context.Context, create bool) (blob.Storage, error) {
	return azure.New(ctx, s.options(), create)
}

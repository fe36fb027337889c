package repository

import (
	"context"
	"encoding/json"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/gcs"
)

// GCS keeps the repository in a bucket of Google Cloud Storage. With no
// credentials given, the machine's own (application default) are used.
type GCS struct {
	Bucket          string
	Prefix          string
	CredentialsFile string // service account, JSON; read each time it is opened
	CredentialsJSON []byte // the same, stored in the configuration file
}

func (s *GCS) validate() error {
	switch {
	case s.Bucket == "":
		return invalid("a Google Cloud Storage repository needs a bucket")
	case s.CredentialsFile != "" && len(s.CredentialsJSON) > 0:
		return invalid("Google Cloud Storage credentials are given twice: give the file or the text")
	case len(s.CredentialsJSON) > 0 && !json.Valid(s.CredentialsJSON):
		return invalid("the Google Cloud Storage credentials are not JSON")
	}
	return nil
}

func (s *GCS) options() *gcs.Options {
	return &gcs.Options{
		BucketName:                    s.Bucket,
		Prefix:                        s.Prefix,
		ServiceAccountCredentialsFile: s.CredentialsFile,
		ServiceAccountCredentialJSON:  s.CredentialsJSON,
	}
}

func (s *GCS) open(ctx context.Context, create bool) (blob.Storage, error) {
	return gcs.New(ctx, s.options(), create)
}

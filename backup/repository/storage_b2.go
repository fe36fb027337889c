package repository

import (
	"context"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/b2"
)

// B2 keeps the repository in a Backblaze B2 bucket by its native protocol. Kopia calls
// this deprecated; B2's S3 endpoint offers more (object lock).
type B2 struct {
	Bucket string
	Prefix string
	KeyID  string
	Key    string
}

func (s *B2) validate() error {
	switch {
	case s.Bucket == "":
		return invalid("a B2 repository needs a bucket")
	case s.KeyID == "" || s.Key == "":
		return invalid("a B2 repository needs an application key ID and its key")
	}
	return nil
}

func (s *B2) options() *b2.Options {
	return &b2.Options{BucketName: s.Bucket, Prefix: s.Prefix, KeyID: s.KeyID, Key: s.Key}
}

func (s *B2) open(ctx context.Context, create bool) (blob.Storage, error) {
	return b2.New(ctx, s.options(), create)
}

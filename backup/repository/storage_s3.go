package repository

import (
	"context"
	"crypto/x509"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/s3"
	"github.com/kopia/kopia/repo/jsonencoding"
)

// S3 keeps the repository in a bucket of Amazon S3 or of a server that speaks
// its protocol. The bucket must exist. With no keys given, they come from the
// environment (AWS_*) or the machine's role each time it is opened.
type S3 struct {
	Bucket   string
	Prefix   string // prefix of every object's name
	Endpoint string // host[:port]; empty for s3.amazonaws.com
	Region   string

	AccessKeyID     string
	SecretAccessKey string
	SessionToken    string

	RoleARN      string // role to assume with the keys
	SessionName  string
	RoleDuration time.Duration
	RoleEndpoint string
	RoleRegion   string

	DisableTLS             bool   // plain HTTP
	DisableTLSVerification bool   // any certificate
	RootCA                 []byte // PEM certificates to trust instead of the machine's

	PointInTime time.Time // read a versioned bucket as of this time; read-only
}

const defaultS3Endpoint = "s3.amazonaws.com"

func (s *S3) validate() error {
	switch {
	case s.Bucket == "":
		return invalid("an S3 repository needs a bucket")
	case strings.Contains(s.Endpoint, "://"):
		return invalid("the S3 endpoint is host[:port], not a URL: %q", s.Endpoint)
	case (s.AccessKeyID == "") != (s.SecretAccessKey == ""):
		return invalid("an S3 access key ID and its secret access key go together: give both, or neither to use the machine's own")
	case s.RoleARN != "" && s.AccessKeyID == "":
		return invalid("to assume an S3 role, give the access key that may do so")
	case len(s.RootCA) > 0 && (s.DisableTLS || s.DisableTLSVerification):
		return invalid("a root certificate has no use when TLS or its verification is off")
	}
	if len(s.RootCA) > 0 && !x509.NewCertPool().AppendCertsFromPEM(s.RootCA) {
		return invalid("the S3 root certificate is not in PEM format")
	}
	return nil
}

func (s *S3) options() *s3.Options {
	o := &s3.Options{
		BucketName:      s.Bucket,
		Prefix:          s.Prefix,
		Endpoint:        s.Endpoint,
		Region:          s.Region,
		AccessKeyID:     s.AccessKeyID,
		SecretAccessKey: s.SecretAccessKey,
		SessionToken:    s.SessionToken,
		RoleARN:         s.RoleARN,
		SessionName:     s.SessionName,
		RoleDuration:    jsonencoding.Duration{Duration: s.RoleDuration},
		RoleEndpoint:    s.RoleEndpoint,
		RoleRegion:      s.RoleRegion,
		DoNotUseTLS:     s.DisableTLS,
		DoNotVerifyTLS:  s.DisableTLSVerification,
		RootCA:          s.RootCA,
	}
	if o.Endpoint == "" {
		o.Endpoint = defaultS3Endpoint
	}
	if !s.PointInTime.IsZero() {
		o.PointInTime = &s.PointInTime
	}
	return o
}

func (s *S3) open(ctx context.Context, create bool) (blob.Storage, error) {
	return s3.New(ctx, s.options(), create)
}

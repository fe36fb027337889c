package repository

import (
	"context"
	"net/url"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/webdav"
)

// WebDAV keeps the repository in a collection of a WebDAV server.
type WebDAV struct {
	URL      string
	User     string
	Password string
	// Fingerprint is the SHA-256 of the server's certificate in hexadecimal; if set, it
	// is trusted instead of the machine's authorities.
	Fingerprint string
	// AtomicWrites says that a failed PUT leaves nothing behind; blobs are then not first
	// uploaded under another name.
	AtomicWrites bool
}

func (s *WebDAV) validate() error {
	u, err := url.Parse(s.URL)
	switch {
	case s.URL == "":
		return invalid("a WebDAV repository needs a URL")
	case err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "":
		return invalid("the URL of a WebDAV repository is http:// or https://, a host and a path")
	case u.User != nil:
		return invalid("give the WebDAV user and password separately, not in the URL")
	}
	return nil
}

func (s *WebDAV) options() *webdav.Options {
	return &webdav.Options{
		URL:                                 s.URL,
		Username:                            s.User,
		Password:                            s.Password,
		TrustedServerCertificateFingerprint: s.Fingerprint,
		AtomicWrites:                        s.AtomicWrites,
	}
}

func (s *WebDAV) open(ctx context.Context, create bool) (blob.Storage, error) {
	o := s.options()
	o.Options = shardsOf(create)
	return webdav.New(ctx, o, create)
}

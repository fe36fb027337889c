package imageio

import (
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/varve-io/varve/internal/secret"
)

// Schemes are those of URIs that Locate reads, and of URLs that it refuses with advice.
var Schemes = []string{"imageio", "imageio+env", "https", "http"}

// IsURI says whether a text begins with one of Schemes.
func IsURI(text string) bool {
	scheme, _, ok := strings.Cut(text, "://")
	for _, s := range Schemes {
		if ok && s == scheme {
			return true
		}
	}
	return false
}

// Locate finds the URL of a transfer, which is a secret and therefore no part of a command
// line:
//
//	imageio:///FILE?tls-ca=FILE      a file holds it, as its one line
//	imageio+env://NAME?tls-ca=FILE   a variable holds it
//
// tls-ca is a file of the certificates that sign the service's; empty for the system's. The
// error is ErrURL for a malformed URI or URL.
func Locate(uri string) (t *Transfer, ca string, err error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, "", fmt.Errorf("%w: the URI cannot be read", ErrURL)
	}
	if u.Scheme == "https" || u.Scheme == "http" {
		return nil, "", fmt.Errorf("%w that is given so: its ticket is a secret, and all users of this machine can read a command line; write the URL to a file that only you can read, and pass imageio:///PATH/OF/FILE", ErrURL)
	}
	for k, v := range u.Query() {
		if k != "tls-ca" || len(v) != 1 || v[0] == "" {
			return nil, "", fmt.Errorf("%w: %s: unknown parameter %q; there is tls-ca=FILE", ErrURL, uri, k)
		}
		ca = v[0]
	}
	if u.User != nil || u.Fragment != "" || u.Opaque != "" {
		return nil, "", fmt.Errorf("%w: %s", ErrURL, uri)
	}
	var text []byte
	from := u.Path
	switch {
	case u.Scheme == "imageio+env":
		from = "$" + u.Host
		if u.Host == "" || u.Path != "" {
			return nil, "", fmt.Errorf("%w: %s: name the variable that holds it, as in imageio+env://TRANSFER_URL", ErrURL, uri)
		}
		text = []byte(os.Getenv(u.Host))
	case u.Host != "" || !filepath.IsAbs(u.Path):
		return nil, "", fmt.Errorf("%w: %s: name the file that holds it by its absolute path, as in imageio:///run/transfer", ErrURL, uri)
	default:
		if text, err = readFile(u.Path); err != nil {
			return nil, "", fmt.Errorf("read the URL of the oVirt transfer: %w", err)
		}
	}
	line, err := secret.Line(text)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %s %w", ErrURL, from, err)
	}
	if t, err = ParseTransfer(line); err != nil {
		return nil, "", fmt.Errorf("%s: %w", from, err)
	}
	return t, ca, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, secret.Max+1))
}

package nbdserver

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
)

// TLSFiles are the PEM files of a server.
type TLSFiles struct {
	// Certificate and Key are the server's own.
	Certificate, Key string
	// ClientCA verifies client certificates; if set, clients must have one.
	ClientCA string
	// AllowTLS12 accepts TLS 1.2 beside 1.3.
	AllowTLS12 bool
}

// LoadTLS makes the configuration for Config.TLS. The certificate is read
// again when its file changes, so that it can be renewed under a running
// server. There are no pre-shared keys: Go's TLS has none.
func LoadTLS(f TLSFiles) (*tls.Config, error) {
	if f.Certificate == "" || f.Key == "" {
		return nil, errors.New("TLS needs both a certificate and its key")
	}
	r := &certificate{cert: f.Certificate, key: f.Key}
	if _, err := r.get(nil); err != nil {
		return nil, err
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: r.get}
	if f.AllowTLS12 {
		cfg.MinVersion = tls.VersionTLS12
	}
	if f.ClientCA != "" {
		pem, err := os.ReadFile(f.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("read the client CA: %w", err)
		}
		cfg.ClientCAs = x509.NewCertPool()
		if !cfg.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("client CA %s holds no PEM certificate", f.ClientCA)
		}
		cfg.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return cfg, nil
}

// certificate is a key pair that follows its files.
type certificate struct {
	cert, key string

	mu      sync.Mutex
	loaded  *tls.Certificate
	changed time.Time // modification time of the loaded certificate
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fi, err := os.Stat(c.cert)
	if err == nil && c.loaded != nil && fi.ModTime().Equal(c.changed) {
		return c.loaded, nil
	}
	var pair tls.Certificate
	if err == nil {
		pair, err = tls.LoadX509KeyPair(c.cert, c.key)
	}
	if err != nil {
		if c.loaded != nil { // half-written: keep the old one, try next time
			return c.loaded, nil
		}
		return nil, fmt.Errorf("load the TLS certificate: %w", err)
	}
	c.loaded, c.changed = &pair, fi.ModTime()
	return c.loaded, nil
}

// clientNames returns the names a verified client certificate proves.
func clientNames(s tls.ConnectionState) []string {
	if len(s.VerifiedChains) == 0 {
		return nil
	}
	leaf := s.VerifiedChains[0][0]
	var names []string
	if leaf.Subject.CommonName != "" {
		names = append(names, leaf.Subject.CommonName)
	}
	names = append(names, leaf.DNSNames...)
	names = append(names, leaf.EmailAddresses...)
	for _, u := range leaf.URIs {
		names = append(names, u.String())
	}
	slices.Sort(names)
	return slices.Compact(names)
}

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

// LoadTLS makes the configuration for Config.TLS. The certificate is read again when its file
// changes, so that it can be renewed while the server runs. There are no pre-shared keys:
// Go's TLS does not support them.
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

// namelessAuthorities returns a configuration that verifies client certificates like cfg, but
// requests them without naming the authorities. GnuTLS (libnbd, qemu) looks for a certificate
// of a named authority whose key fits the requested signatures, and assumes that RSA keys fit
// PKCS #1 v1.5 only, which TLS 1.3 does not sign with: it would send no certificate. Without
// names it sends the only one it has. It returns nil if cfg needs no change.
func namelessAuthorities(cfg *tls.Config) *tls.Config {
	// A configuration chosen per client would not verify what this one does.
	if cfg == nil || cfg.ClientAuth < tls.VerifyClientCertIfGiven || cfg.GetConfigForClient != nil {
		return nil
	}
	c := cfg.Clone()
	c.ClientCAs = nil
	c.ClientAuth = tls.RequestClientCert
	if cfg.ClientAuth == tls.RequireAndVerifyClientCert {
		c.ClientAuth = tls.RequireAnyClientCert
	}
	// Unlike VerifyPeerCertificate this is called for resumed sessions, too.
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if err := verifyClient(cfg, s.PeerCertificates); err != nil {
			return err
		}
		if cfg.VerifyConnection != nil {
			return cfg.VerifyConnection(s)
		}
		return nil
	}
	return c
}

// verifyClient verifies a client's certificates as crypto/tls would.
func verifyClient(cfg *tls.Config, sent []*x509.Certificate) error {
	if len(sent) == 0 {
		return nil // allowed here, or refused before
	}
	opts := x509.VerifyOptions{
		Roots: cfg.ClientCAs, Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if cfg.Time != nil {
		opts.CurrentTime = cfg.Time()
	}
	for _, c := range sent[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := sent[0].Verify(opts); err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: sent, Err: err}
	}
	return nil
}

// clientNames returns the names in a verified client certificate. verified means that
// verifyClient has verified all certificates of s.
func clientNames(s tls.ConnectionState, verified bool) []string {
	var leaf *x509.Certificate
	switch {
	case len(s.VerifiedChains) > 0:
		leaf = s.VerifiedChains[0][0]
	case verified && len(s.PeerCertificates) > 0:
		leaf = s.PeerCertificates[0]
	default:
		return nil
	}
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

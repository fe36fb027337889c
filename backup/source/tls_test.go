package source_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/internal/porttest"
)

// certificates makes a CA and the certificates of a server and a client, in the files that
// QEMU and libnbd look for.
func certificates(t *testing.T, dir string) {
	t.Helper()
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i) + 1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if ca == nil {
			c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.DNSNames, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil, nil
			ca, caKey = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, ca, &key.PublicKey, caKey)
		if err != nil {
			t.Fatal(err)
		}
		pkcs, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		for file, block := range map[string]*pem.Block{
			name + "-cert.pem": {Type: "CERTIFICATE", Bytes: der}, name + "-key.pem": {Type: "PRIVATE KEY", Bytes: pkcs},
		} {
			if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestNBDOverTLS reads from a qemu-nbd that takes clients with a certificate only.
func TestNBDOverTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certificates(t, dir)
	raw := filepath.Join(dir, "disk.img")
	disk := bytes.Repeat([]byte("over TLS"), 1<<18)
	if err := os.WriteFile(raw, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	port := strconv.Itoa(porttest.Free(t))
	serveNBD(t, "qemu-nbd", "-t", "-r", "-e", "8", "-f", "raw", "-x", "disk", "-b", "127.0.0.1", "-p", port,
		"--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir="+dir, "--tls-creds", "tls0", raw)
	uri := "nbds://localhost:" + port + "/disk"
	if s := take(t, uri+"?tls-certificates="+dir, source.Options{}, nil); !bytes.Equal(s.bytes, disk) {
		t.Error("the disk reads otherwise")
	}
	for name, uri := range map[string]string{
		"not encrypted": "nbd://localhost:" + port + "/disk", "without a certificate": uri,
		"another name": uri + "?tls-certificates=" + dir + "&tls-hostname=elsewhere",
	} {
		if s, err := source.Open(t.Context(), uri, source.Options{}); err == nil {
			t.Errorf("%s: opened", name)
			_ = s.Close()
		}
	}
}

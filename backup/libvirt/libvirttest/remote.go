// Package libvirttest has what tests need to reach a libvirt as if it ran on another host.
package libvirttest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/varve-io/varve/internal/porttest"
)

// StartSSH starts a server of our own for the test's duration, and returns a directory with a program ssh that
// reaches it as the host varve-test. Needs root, sshd and ssh-keygen.
func StartSSH(t testing.TB) (path string) {
	t.Helper()
	dir, port := t.TempDir(), porttest.Free(t)
	for _, key := range []string{"host", "user"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	hostKey, err := os.ReadFile(filepath.Join(dir, "host.pub"))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"sshd_config": fmt.Sprintf("Port %d\nListenAddress 127.0.0.1\nHostKey %[2]s/host\nAuthorizedKeysFile %[2]s/user.pub\nStrictModes no\nPermitRootLogin yes\nUsePAM no\nPidFile none\n", port, dir),
		"config":      fmt.Sprintf("Host varve-test\nHostName 127.0.0.1\nPort %d\nUser root\nIdentityFile %[2]s/user\nUserKnownHostsFile %[2]s/known\n", port, dir),
		"known":       fmt.Sprintf("[127.0.0.1]:%d %s", port, hostKey),
		"ssh":         "#!/bin/sh\nexec /usr/bin/ssh -F " + dir + "/config \"$@\"\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // for its privilege separation
		t.Fatal(err)
	}
	server, err := exec.LookPath("sshd")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(server, "-D", "-e", "-f", filepath.Join(dir, "sshd_config"))
	var out bytes.Buffer
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("sshd: %s", &out)
		}
	})
	for {
		if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			_ = conn.Close()
			return dir
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("sshd does not listen: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// WriteCertificates writes to a new directory those of a certificate authority, of localhost and of a client, by
// QEMU's names and by libvirt's, and the port, for backup/source/testdata/libvirtd.sh.
func WriteCertificates(t testing.TB, dir string, port int) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, one := range []struct {
		names []string // of the certificate
		key   string
		usage x509.ExtKeyUsage
	}{{[]string{"ca-cert.pem", "cacert.pem"}, "ca-key.pem", 0}, {[]string{"server-cert.pem"}, "server-key.pem", x509.ExtKeyUsageServerAuth}, {[]string{"clientcert.pem"}, "clientkey.pem", x509.ExtKeyUsageClientAuth}} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: one.key}, BasicConstraintsValid: true,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"},
			KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: []x509.ExtKeyUsage{one.usage},
		}
		if ca == nil {
			c.IsCA, c.KeyUsage, c.ExtKeyUsage, c.DNSNames = true, x509.KeyUsageCertSign, nil, nil
			ca, caKey = c, key
		}
		b, err := x509.CreateCertificate(rand.Reader, c, ca, &key.PublicKey, caKey)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range one.names {
			write(name, "CERTIFICATE", b)
		}
		if b, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			t.Fatal(err)
		}
		write(one.key, "PRIVATE KEY", b)
	}
	if err := os.WriteFile(filepath.Join(dir, "port"), []byte(fmt.Sprint(port)), 0o600); err != nil {
		t.Fatal(err)
	}
}

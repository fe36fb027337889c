package nbd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority is a CA that issues certificates as PEM files, one directory for each client,
// with the names that libnbd and qemu expect.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der := a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign}, &a.key.PublicKey)
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a.cert = cert
	return a
}

func (a *authority) sign(c *x509.Certificate, public *ecdsa.PublicKey) []byte {
	a.t.Helper()
	c.SerialNumber, _ = rand.Int(rand.Reader, big.NewInt(1<<62))
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	parent := a.cert
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, public, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// issue makes a directory with ca-cert.pem, ROLE-cert.pem and ROLE-key.pem for
// a name.
func (a *authority) issue(role, name string) string {
	a.t.Helper()
	dir := filepath.Join(a.dir, role+"-"+name)
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der := a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, &key.PublicKey)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		a.t.Fatal(err)
	}
	for file, b := range map[string]*pem.Block{
		"ca-cert.pem":      {Type: "CERTIFICATE", Bytes: a.cert.Raw},
		role + "-cert.pem": {Type: "CERTIFICATE", Bytes: der},
		role + "-key.pem":  {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(b), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	return dir
}

// Over TCP with certificates on both sides: each real client reads what its name allows;
// a stranger's certificate, or none, gets nothing.
func TestMutualTLS(t *testing.T) {
	s := newSite(t)
	extra := s.path("pay.img")
	if err := os.WriteFile(extra, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s.varve("backup", extra, "--volume", "hr/pay")
	ca := newAuthority(t)
	own, team, ops, nobody := ca.issue("server", "localhost"), ca.issue("client", "shop-team"), ca.issue("client", "ops"), ca.issue("client", "nobody")
	stranger := newAuthority(t).issue("client", "ops")
	if err := os.WriteFile(filepath.Join(stranger, "ca-cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw}), 0o600); err != nil {
		t.Fatal(err) // it trusts the server, but not the other way round
	}
	srv := s.serve("--listen", "127.0.0.1:0", "--tls-cert", own+"/server-cert.pem", "--tls-key", own+"/server-key.pem",
		"--tls-client-ca", own+"/ca-cert.pem", "--allow", "shop-*=shop/*", "--allow", "ops=*")
	address := srv.addresses[1]
	uri := func(certificates, export string) string {
		return "nbds://" + address + "/" + export + "?tls-certificates=" + url.QueryEscape(certificates)
	}
	s.run("nbdcopy", "--connections=4", uri(team, "shop/db@latest"), s.path("copy"))
	s.same(s.path("copy"), s.latest().want)
	s.has(s.run("nbdinfo", uri(team, "shop/db@latest")), "protocol: newstyle-fixed with TLS")
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	s.has(s.run("qemu-img", "compare", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+team, "--image-opts",
		"driver=nbd,server.type=inet,server.host="+host+",server.port="+port+",tls-creds=tls0,export="+s.latest().Name,
		"driver=raw,file.filename="+s.latest().want), "identical")

	list := s.varve("nbd", "list", uri(team, ""))
	if !strings.Contains(list, "shop/db@") || strings.Contains(list, "hr/pay@") {
		t.Errorf("the team sees\n%s", list)
	}
	s.has(s.varve("nbd", "list", uri(ops, "")), "shop/db@", "hr/pay@")
	s.varve("nbd", "info", uri(ops, "hr/pay@latest"))
	if list := s.varve("nbd", "list", uri(nobody, "")); strings.Contains(list, "@") {
		t.Errorf("a client without a rule sees\n%s", list)
	}
	_, hidden, err := s.try(varveBin, "nbd", "info", uri(team, "hr/pay@latest"))
	_, unknown, _ := s.try(varveBin, "nbd", "info", uri(team, "hr/non@latest"))
	if err == nil || strings.ReplaceAll(hidden, "pay", "non") != unknown {
		t.Errorf("a forbidden export answers\n%sand an unknown one\n%s", hidden, unknown)
	}
	for what, refused := range map[string]string{
		"another authority's certificate": uri(stranger, "shop/db@latest"),
		"no certificate":                  "nbds://" + address + "/shop/db@latest?tls-certificates=" + url.QueryEscape(onlyCA(t, own)),
		"no TLS":                          "nbd://" + address + "/shop/db@latest",
	} {
		for _, client := range [][]string{{varveBin, "nbd", "read", "--length", "512"}, {"nbdinfo"}} {
			if out, _, err := s.try(client[0], append(client[1:], refused)...); err == nil {
				t.Errorf("%s: %s got\n%s", what, filepath.Base(client[0]), out)
			}
		}
	}
	// Other clients are not affected.
	s.run("nbdcopy", uri(ops, s.points[0].Name), s.path("copy"))
	s.same(s.path("copy"), s.points[0].want)
}

// onlyCA is the directory of a client that trusts the server and has no
// certificate.
func onlyCA(t *testing.T, from string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(from, "ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ca-cert.pem"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

package nbdserver_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// pki is a CA and the certificates it gave out, as PEM files the way libnbd
// looks for them.
type pki struct {
	t    *testing.T
	dir  string
	ca   *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	p := &pki{t: t, dir: t.TempDir(), pool: x509.NewCertPool()}
	p.key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der := p.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign}, &p.key.PublicKey)
	p.ca, _ = x509.ParseCertificate(der)
	p.pool.AddCert(p.ca)
	p.write("ca-cert.pem", "CERTIFICATE", der)
	p.issue("server", "localhost")
	return p
}

func (p *pki) sign(c *x509.Certificate, pub crypto.PublicKey) []byte {
	p.t.Helper()
	c.SerialNumber, _ = rand.Int(rand.Reader, big.NewInt(1<<62))
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent := p.ca
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	return der
}

func (p *pki) write(name, typ string, der []byte) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// issue makes ROLE-cert.pem and ROLE-key.pem.
func (p *pki) issue(role, name string) tls.Certificate {
	p.t.Helper()
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return p.issueFor(role, name, key)
}

func (p *pki) issueFor(role, name string, key crypto.Signer) tls.Certificate {
	p.t.Helper()
	der := p.sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}, key.Public())
	p.write(role+"-cert.pem", "CERTIFICATE", der)
	pkcs, _ := x509.MarshalPKCS8PrivateKey(key)
	p.write(role+"-key.pem", "PRIVATE KEY", pkcs)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (p *pki) config(mutual bool) *tls.Config {
	p.t.Helper()
	f := nbdserver.TLSFiles{Certificate: filepath.Join(p.dir, "server-cert.pem"), Key: filepath.Join(p.dir, "server-key.pem")}
	if mutual {
		f.ClientCA = filepath.Join(p.dir, "ca-cert.pem")
	}
	cfg, err := nbdserver.LoadTLS(f)
	if err != nil {
		p.t.Fatal(err)
	}
	return cfg
}

// dialTLS upgrades a connection as the named client; "" has no certificate.
func (p *pki) dialTLS(t *testing.T, path, name string) (*nbdclient.Client, error) {
	t.Helper()
	nc := dialUnix(t, path)
	t.Cleanup(func() { _ = nc.Close() })
	c, err := nbdclient.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: p.pool, ServerName: "localhost"}
	if name != "" {
		cfg.Certificates = []tls.Certificate{p.issue("client", name)}
	}
	return c, c.StartTLS(ctx(t), cfg)
}

// The whole suite over TLS.
func TestConformanceTLS(t *testing.T) {
	p := newPKI(t)
	cfg := p.config(false)
	traits := nbdtest.Traits{Writable: true, LeftOut: map[string]string{"handshake/not-fixed": "TLS needs fixed newstyle"}}
	nbdtest.Run(t, traits, func(t *testing.T) nbdtest.Target {
		_, path := serve(t, nbdserver.Config{TLS: cfg, Catalog: single(nbdtest.NewDisk(nbdtest.Image()).Writable())})
		return nbdtest.Target{Export: "disk", Dial: func(t testing.TB) net.Conn {
			nc := dialUnix(t, path)
			return &afterTLS{Conn: nc, config: &tls.Config{RootCAs: p.pool, ServerName: "localhost"}}
		}}
	})
}

// afterTLS upgrades a connection and then plays the server's greeting again,
// so that a client without TLS can continue.
type afterTLS struct {
	net.Conn
	config *tls.Config
	tls    *tls.Conn
	hello  []byte
}

func (a *afterTLS) Read(p []byte) (int, error) {
	if a.tls == nil {
		a.hello = make([]byte, 18)
		if _, err := a.Conn.Read(a.hello); err != nil {
			return 0, err
		}
		return copy(p, a.hello), nil
	}
	return a.tls.Read(p)
}

func (a *afterTLS) Write(p []byte) (int, error) {
	if a.tls != nil {
		return a.tls.Write(p)
	}
	// The first write is the client's flags.
	if _, err := a.Conn.Write(p); err != nil {
		return 0, err
	}
	r := nbdtest.StartTLSRequest()
	if _, err := a.Conn.Write(r); err != nil {
		return len(p), nil // the server hung up on the flags: the reader will see
	}
	reply := make([]byte, 20)
	if _, err := a.Conn.Read(reply); err != nil {
		return len(p), nil // the server hung up on the flags: the reader will see
	}
	a.tls = tls.Client(a.Conn, a.config)
	if err := a.tls.Handshake(); err != nil {
		return 0, err
	}
	return len(p), nil
}

// In forced mode nothing is revealed without TLS.
func TestForcedTLS(t *testing.T) {
	p := newPKI(t)
	_, path := serve(t, nbdserver.Config{TLS: p.config(false), Catalog: single(nbdtest.NewDisk(nbdtest.Image()).ReadOnly())})
	target := nbdtest.Target{Export: "disk", Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
	r := target.DialOptions(t, nbdtest.Fixed)
	for _, o := range []proto.Option{proto.OptList, proto.OptInfo, proto.OptGo, proto.OptStructuredReply, proto.OptExtendedHeaders,
		proto.OptListMetaContext, proto.OptSetMetaContext, 4711} {
		for _, data := range []string{"", "some data"} {
			r.Option(o, []byte(data))
			r.Want(o, proto.RepErrTLSRequired)
		}
	}
	r.Option(proto.OptStartTLS, []byte("data"))
	r.Want(proto.OptStartTLS, proto.RepErrInvalid)
	r.Option(proto.OptAbort)
	r.Want(proto.OptAbort, proto.RepAck)
	r = target.DialOptions(t, nbdtest.Fixed)
	r.Option(proto.OptExportName, []byte("disk"))
	r.WantClosed()
	// Bytes sent in the clear after STARTTLS are not treated as protected.
	r = target.DialOptions(t, nbdtest.Fixed)
	r.Send(nbdtest.StartTLSRequest(), nbdtest.StartTLSRequest())
	r.Want(proto.OptStartTLS, proto.RepAck)
	r.WantClosed()
}

// STARTTLS drops what was negotiated before, and is done once.
func TestStartTLSDropsState(t *testing.T) {
	p := newPKI(t)
	_, path := serve(t, nbdserver.Config{TLS: p.config(false), PlainLocal: true, Catalog: single(nbdtest.NewDisk(nbdtest.Image()).ReadOnly())})
	c := negotiate(t, dialUnix(t, path), nbdclient.Extended)
	if _, err := c.SetContexts("disk", proto.ContextAllocation); err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: p.pool, ServerName: "localhost"}
	if err := c.StartTLS(ctx(t), cfg); err != nil {
		t.Fatal(err)
	}
	if err := c.StartTLS(ctx(t), cfg); err == nil || !strings.Contains(err.Error(), "ERR_INVALID") {
		t.Errorf("second STARTTLS: %v", err)
	}
	in, err := c.Info("disk")
	if err != nil || in.Flags&(proto.FlagSendDF|proto.FlagBlockStatusPayload) != 0 {
		t.Errorf("after STARTTLS: flags %#x, %v", in.Flags, err)
	}
	// Without a certificate of its own, a server says so.
	_, path = serve(t, nbdserver.Config{Catalog: single(holes{size: 512})})
	if err := negotiate(t, dialUnix(t, path), nbdclient.Simple).StartTLS(ctx(t), cfg); err == nil || !strings.Contains(err.Error(), "ERR_POLICY") {
		t.Errorf("STARTTLS without a certificate: %v", err)
	}
}

func TestTLSVersions(t *testing.T) {
	p := newPKI(t)
	files := nbdserver.TLSFiles{Certificate: filepath.Join(p.dir, "server-cert.pem"), Key: filepath.Join(p.dir, "server-key.pem")}
	for _, allow := range []bool{false, true} {
		files.AllowTLS12 = allow
		cfg, err := nbdserver.LoadTLS(files)
		if err != nil {
			t.Fatal(err)
		}
		_, path := serve(t, nbdserver.Config{TLS: cfg, Catalog: single(holes{size: 512})})
		c := negotiate(t, dialUnix(t, path), nbdclient.Simple)
		err = c.StartTLS(ctx(t), &tls.Config{RootCAs: p.pool, ServerName: "localhost", MaxVersion: tls.VersionTLS12})
		if (err == nil) != allow {
			t.Errorf("TLS 1.2 with AllowTLS12=%v: %v", allow, err)
		}
	}
	if _, err := nbdserver.LoadTLS(nbdserver.TLSFiles{Certificate: files.Certificate}); err == nil {
		t.Error("certificate without key is accepted")
	}
}

// A renewed certificate is used without a restart.
func TestTLSRenewal(t *testing.T) {
	p := newPKI(t)
	_, path := serve(t, nbdserver.Config{TLS: p.config(false), Catalog: single(holes{size: 512})})
	if _, err := p.dialTLS(t, path, ""); err != nil {
		t.Fatal(err)
	}
	p.issue("server", "elsewhere")
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(p.dir, "server-cert.pem"), later, later); err != nil {
		t.Fatal(err)
	}
	if _, err := p.dialTLS(t, path, ""); err == nil {
		t.Error("old certificate is still served")
	}
}

// Clients see and open what their certificate's name allows; everything else
// answers like a name that does not exist.
func TestAccess(t *testing.T) {
	p := newPKI(t)
	cat := nbdserver.NewStatic()
	for _, n := range []string{"shop/db@1", "shop/web@1", "hr/db@1"} {
		cat.Add(nbdserver.Opened{Name: n, Export: nbdtest.NewEmptyDisk(4096).ReadOnly()})
	}
	var rules []nbdserver.AccessRule
	for _, s := range []string{"shop-*=shop/*", "dba=*/db@*"} {
		r, err := nbdserver.ParseAccessRule(s)
		if err != nil {
			t.Fatal(err)
		}
		rules = append(rules, r)
	}
	_, path := serve(t, nbdserver.Config{TLS: p.config(true), Catalog: nbdserver.Restrict(cat, rules)})
	for client, want := range map[string][]string{
		"shop-team": {"shop/db@1", "shop/web@1"},
		"dba":       {"hr/db@1", "shop/db@1"},
		"stranger":  nil,
	} {
		c, err := p.dialTLS(t, path, client)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		if err := c.List(func(l nbdclient.Listed) bool { got = append(got, l.Name); return true }); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s sees %q, %v", client, got, err)
		}
		_, unknown := c.Info("no/such@1")
		for _, n := range []string{"shop/db@1", "shop/web@1", "hr/db@1"} {
			_, err := c.Info(n)
			if (err == nil) != slices.Contains(want, n) {
				t.Errorf("%s opens %s: %v", client, n, err)
			}
			if err != nil && strings.ReplaceAll(err.Error(), n, "") != strings.ReplaceAll(unknown.Error(), "no/such@1", "") {
				t.Errorf("%s: forbidden and unknown differ: %v, %v", client, err, unknown)
			}
		}
	}
	// Without a certificate the handshake fails, at the latest when used.
	c, err := p.dialTLS(t, path, "")
	if err == nil {
		_, err = c.Info("shop/db@1")
	}
	if err == nil {
		t.Error("client without a certificate got in")
	}
	for _, bad := range []string{"", "x", "=x", "x="} {
		if _, err := nbdserver.ParseAccessRule(bad); err == nil {
			t.Errorf("rule %q is accepted", bad)
		}
	}
}

// libnbd speaks TLS with the same files.
func TestTLSInterop(t *testing.T) {
	p := newPKI(t)
	p.issue("client", "dba")
	_, path := serve(t, nbdserver.Config{TLS: p.config(true), Catalog: single(nbdtest.NewDisk(nbdtest.Image()).ReadOnly())})
	uri := "nbds+unix:///disk?tls-hostname=localhost&socket=" + path + "&tls-certificates=" + p.dir
	u, err := nbdclient.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	c, err := nbdclient.Dial(context.Background(), u, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Info("disk"); err != nil || c.Abort() != nil {
		t.Error(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	// tls-hostname is known to libnbd from 1.16 on; 1.14 checks localhost for
	// unix sockets.
	run(t, "nbdcopy", "nbds+unix:///disk?socket="+path+"&tls-certificates="+p.dir, out)
	sameAsImage(t, out)
}

// libnbd and qemu get in with an RSA key, which GnuTLS offers over TLS 1.3 only where no
// authority is named.
func TestTLSInteropRSA(t *testing.T) {
	p := newPKI(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p.issueFor("client", "dba", key)
	rule, _ := nbdserver.ParseAccessRule("dba=disk")
	_, path := serve(t, nbdserver.Config{TLS: p.config(true),
		Catalog: nbdserver.Restrict(single(nbdtest.NewDisk(nbdtest.Image()).ReadOnly()), []nbdserver.AccessRule{rule})})
	out := filepath.Join(t.TempDir(), "out")
	run(t, "nbdcopy", "nbds+unix:///disk?socket="+path+"&tls-certificates="+p.dir, out)
	sameAsImage(t, out)
	if err := os.Remove(out); err != nil {
		t.Fatal(err)
	}
	l, err := nbdserver.Listen("127.0.0.1:0") // qemu checks names of TCP servers only
	if err != nil {
		t.Fatal(err)
	}
	srv, err := nbdserver.New(nbdserver.Config{TLS: p.config(true), Catalog: single(nbdtest.NewDisk(nbdtest.Image()).ReadOnly())})
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Close)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	run(t, "qemu-img", "convert", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+p.dir, "--image-opts",
		"driver=nbd,server.type=inet,server.host=localhost,server.port="+port+",tls-creds=tls0,export=disk", "-O", "raw", out)
	sameAsImage(t, out)
}

// Authorities of clients are not named, and certificates of others refused all the same,
// also where none need be sent.
func TestClientAuthorities(t *testing.T) {
	p, stranger := newPKI(t), newPKI(t)
	for _, auth := range []tls.ClientAuthType{tls.RequireAndVerifyClientCert, tls.VerifyClientCertIfGiven} {
		cfg := p.config(true)
		cfg.ClientAuth = auth
		asked := false
		cfg.VerifyConnection = func(tls.ConnectionState) error { asked = true; return nil }
		rule, _ := nbdserver.ParseAccessRule("dba=disk")
		_, path := serve(t, nbdserver.Config{TLS: cfg, Catalog: nbdserver.Restrict(single(holes{size: 512}), []nbdserver.AccessRule{rule})})
		info := func(send tls.Certificate) error {
			c := negotiate(t, dialUnix(t, path), nbdclient.Simple)
			err := c.StartTLS(ctx(t), &tls.Config{RootCAs: p.pool, ServerName: "localhost",
				GetClientCertificate: func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
					if len(r.AcceptableCAs) > 0 {
						t.Errorf("the server names %d authorities", len(r.AcceptableCAs))
					}
					return &send, nil
				}})
			if err == nil {
				_, err = c.Info("disk")
			}
			return err
		}
		if err := info(p.issue("client", "dba")); err != nil || !asked {
			t.Errorf("%v: a client of the authority: %v, own check called %v", auth, err, asked)
		}
		var refused *nbdclient.RefusedError
		if err := info(stranger.issue("client", "dba")); err == nil || errors.As(err, &refused) {
			t.Errorf("%v: a client of another authority: %v", auth, err)
		}
		if err := info(tls.Certificate{}); err == nil || errors.As(err, &refused) != (auth == tls.VerifyClientCertIfGiven) {
			t.Errorf("%v: a client without a certificate: %v", auth, err)
		}
	}
}

// movable is a catalogue whose alias "latest" can be moved.
type movable struct {
	*nbdserver.Static
	latest string
}

func (m *movable) Resolve(ctx context.Context, name string, c nbdserver.Client) (string, error) {
	if name == "latest" {
		name = m.latest
	}
	return m.Static.Resolve(ctx, name, c)
}

// An alias stays bound to one disk while it is in use, and for a while longer.
func TestAliases(t *testing.T) {
	now := time.Unix(0, 0)
	m := &movable{Static: nbdserver.NewStatic(), latest: "a"}
	m.Add(nbdserver.Opened{Name: "a", Export: nbdtest.NewEmptyDisk(4096).ReadOnly()})
	m.Add(nbdserver.Opened{Name: "b", Export: nbdtest.NewEmptyDisk(4096).ReadOnly()})
	m.Add(nbdserver.Opened{Name: "w", Export: nbdtest.NewEmptyDisk(4096).Writable()})
	al := nbdserver.NewAliases(m, nbdserver.AliasGrace, func() time.Time { return now })
	open := func(want string) *nbdserver.Opened {
		t.Helper()
		o, err := al.Open(context.Background(), "latest", nbdserver.Client{})
		if err != nil {
			t.Fatal(err)
		}
		if o.Name != want {
			t.Errorf("latest is %s, want %s", o.Name, want)
		}
		if got, err := al.Resolve(context.Background(), "latest", nbdserver.Client{}); err != nil || got != want {
			t.Errorf("latest resolves to %s, %v", got, err)
		}
		return o
	}
	first := open("a")
	m.latest = "b"
	now = now.Add(time.Hour)
	second := open("a")
	first.Close()
	first.Close() // twice does no harm
	now = now.Add(time.Hour)
	open("a").Close()
	second.Close()
	now = now.Add(nbdserver.AliasGrace - 1)
	open("a").Close() // a reconnect in time
	now = now.Add(nbdserver.AliasGrace)
	open("b").Close()
	// A deleted disk is not offered, and then the alias moves on.
	m.latest = "a"
	m.Remove("b")
	if _, err := al.Open(context.Background(), "latest", nbdserver.Client{}); !errors.Is(err, nbdserver.ErrUnknownExport) {
		t.Errorf("alias of a deleted disk: %v", err)
	}
	open("a").Close()
	// A writable one is bound for good once a client stays, not by one that asks.
	now = now.Add(nbdserver.AliasGrace)
	m.latest = "w"
	open("w").Close()
	m.latest = "a"
	now = now.Add(nbdserver.AliasGrace)
	open("a").Close()
	now = now.Add(nbdserver.AliasGrace)
	m.latest = "w"
	stays := open("w")
	if err := stays.Enter(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	stays.Close()
	m.latest = "a"
	now = now.Add(1000 * time.Hour)
	open("w").Close()
}

package kopia

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestThroughAKopiaServer reads recovery points through a real Kopia API server, where
// only objects can be requested, no contents.
func TestThroughAKopiaServer(t *testing.T) {
	s := newSite(t)
	s.varve("repo", "create", "filesystem", "--path", s.repo)
	d := newDisk(t, s.dir, 70<<20+99)
	first := s.backup(d.path, "shop/db")
	want := append([]byte(nil), d.data...)
	d.scribble(400_000)
	d.save()
	second := s.backup(d.path, "shop/db")

	s.connectKopia()
	// A server lets a user see the snapshots of that user and host only: shop at
	// the cluster that the points are of.
	host := s.snapshots()[0].Source.Host
	s.kopia("server", "users", "add", "shop@"+host, "--user-password="+password)
	url, fingerprint := s.startServer()
	conf := filepath.Join(s.dir, "server.config")
	s.varve("--config", conf, "repo", "connect", "kopia-server",
		"--url", url, "--fingerprint", fingerprint, "--user", "shop@"+host)
	for _, p := range []struct {
		name string
		want []byte
	}{{first.ID, want}, {second.ID, d.data}} {
		target := filepath.Join(s.dir, "server.img")
		s.varve("--config", conf, "restore", p.name, target, "--no-progress")
		got, err := os.ReadFile(target)
		if err != nil {
			t.Fatal(err)
		}
		s.equal("through the server: "+p.name, got, p.want)
		if err := os.Remove(target); err != nil {
			t.Fatal(err)
		}
	}
	out, err := s.command(varveBin, "--config", conf, "backup", d.path, "--volume", "shop/db").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "read-only") {
		t.Errorf("a backup through a server: %v\n%s", err, out)
	}
}

// startServer runs a Kopia server until the test ends.
func (s *site) startServer() (url, fingerprint string) {
	s.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		s.t.Fatal(err)
	}
	cmd := s.command(kopiaBin, "--config-file="+s.kopiaConfig(), "server", "start", "--address="+addr,
		"--tls-generate-cert", "--tls-cert-file="+filepath.Join(s.dir, "server.cert"), "--tls-key-file="+filepath.Join(s.dir, "server.key"),
		"--server-username=admin", "--server-password="+password)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	s.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
	})
	for { // polled, since the server gives no signal
		select {
		case err := <-exited:
			exited <- err
			s.t.Fatalf("kopia server ended: %v", err)
		default:
		}
		c, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			continue
		}
		sum := sha256.Sum256(c.ConnectionState().PeerCertificates[0].Raw)
		_ = c.Close()
		return "https://" + addr, hex.EncodeToString(sum[:])
	}
}

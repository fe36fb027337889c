package kopia

import (
	"bufio"
	"io"
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
	// It prints the port that it was given: one that was free before may be another program's by now.
	cmd := s.command(kopiaBin, "--config-file="+s.kopiaConfig(), "server", "start", "--address=127.0.0.1:0",
		"--tls-generate-cert", "--tls-cert-file="+filepath.Join(s.dir, "server.cert"), "--tls-key-file="+filepath.Join(s.dir, "server.key"),
		"--server-username=admin", "--server-password="+password)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	read := make(chan struct{})
	s.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-read
		_ = cmd.Wait()
	})
	lines := bufio.NewScanner(stderr)
	for (url == "" || fingerprint == "") && lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		switch name {
		case "SERVER ADDRESS":
			url = value
		case "SERVER CERT SHA256":
			fingerprint = value
		}
	}
	go func() {
		defer close(read)
		_, _ = io.Copy(io.Discard, stderr)
	}()
	if url == "" || fingerprint == "" {
		s.t.Fatalf("kopia server printed the address %q and the fingerprint %q: %v", url, fingerprint, lines.Err())
	}
	return url, fingerprint
}

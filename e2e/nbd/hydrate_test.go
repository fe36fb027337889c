package nbd

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// The server is killed while a disk hydrates, and continues after a restart; once the
// copy is complete, the repository's blocks may be deleted.
func TestHydrate(t *testing.T) {
	s := newSite(t)
	copies := s.path("copies")
	flags := []string{"--hydrate", "--hydrate-dir", copies, "--cache-size", "1M", "--refresh", "1h", "--log-level", "info"}
	for range 2 {
		srv := s.serve(flags...)
		s.run("nbdcopy", "--connections=4", srv.uri("shop/db@latest"), s.path("copy"))
		s.same(s.path("copy"), s.latest().want)
		if err := srv.cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = srv.cmd.Wait()
	}
	srv := s.serve(flags...)
	s.has(s.varve("nbd", "info", srv.uri("shop/db@latest")), "read-only")
	s.varve("nbd", "read", srv.uri("shop/db@latest"), "--length", "512", s.path("first"))
	// It stays open for a minute after its last client, which may not be enough on a busy machine.
	leave := srv.stay("shop/db@latest")
	waitFor(t, func() bool { return strings.Contains(srv.log.String(), "an image is here as a whole") })
	leave()
	srv.stop()
	if _, err := os.Stat(filepath.Join(copies, s.latest().ID, "data")); err != nil {
		t.Fatal(err)
	}
	srv = s.serve(append(flags, "--writable")...)
	// Reading the map reads the indexes, which are in the repository.
	s.has(s.run("nbdinfo", "--map", srv.uri("shop/db@latest")), "data", "hole,zero")
	for path := range s.packs() {
		if strings.HasPrefix(filepath.Base(path), "p") {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.run("nbdcopy", "--connections=4", srv.uri("shop/db@latest"), s.path("copy"))
	s.same(s.path("copy"), s.latest().want)
	s.run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 64k 128k", "-c", "flush", "-c", "read -P 0x5a 64k 32k", srv.uri("shop/db@latest"))
	srv.stop()
	if err := os.RemoveAll(copies); err != nil {
		t.Fatal(err)
	}
}

// Without a directory the copies end with the server; at their limit the disk can still
// be read.
func TestHydrateLimit(t *testing.T) {
	s := newSite(t)
	srv := s.serve("--hydrate", "--hydrate-limit", "4M")
	for range 2 {
		s.run("nbdcopy", "--connections=4", srv.uri("shop/db@latest"), s.path("copy"))
		s.same(s.path("copy"), s.latest().want)
	}
	waitFor(t, func() bool { return strings.Contains(srv.log.String(), "reached its limit") })
	if n := strings.Count(srv.log.String(), "reached its limit"); n != 1 {
		t.Errorf("the log says so %d times", n)
	}
}

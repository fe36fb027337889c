package repository

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/backup/repository/repotest/servers"
)

// roundTrip creates a repository on a storage, writes a block and reads it back through
// another connection.
func roundTrip(t *testing.T, storage Storage) site {
	t.Helper()
	s := newSite(t)
	opt := CreateOptions{ConnectOptions: s.connect()}
	opt.Storage = storage
	if err := Create(t.Context(), opt); err != nil {
		t.Fatal(err)
	}
	r := s.mustOpen(t)
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	oid, err := w.WriteBlock(t.Context(), []byte("over the network"))
	if err = errors.Join(err, w.Flush(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	if p, err := s.mustOpen(t).ReadObject(t.Context(), oid); err != nil || string(p) != "over the network" {
		t.Errorf("read %q, %v", p, err)
	}
	return s
}

func TestWebDAV(t *testing.T) {
	t.Parallel() // it waits for retries most of the time
	dav := servers.StartWebDAV(t, t.TempDir())
	s := roundTrip(t, &WebDAV{URL: dav.URL, User: dav.User, Password: dav.Password})
	dav.Stop(t)
	_, err := s.open(t, testPassword)
	wantError(t, err, ErrUnreachable, dav.URL)
}

func TestSFTP(t *testing.T) {
	t.Parallel()
	server := servers.StartSFTP(t)
	storage := SFTP{
		Host: server.Host, Port: server.Port, User: server.User, Password: server.Password,
		KnownHostsData: server.KnownHosts, Path: filepath.Join(t.TempDir(), "repository"),
	}
	roundTrip(t, &storage)
	for _, bad := range []struct {
		name   string
		change func(*SFTP)
	}{
		{"password", func(s *SFTP) { s.Password = "wrong-secret" }},
		{"host key", func(s *SFTP) { s.KnownHostsData = servers.StartSFTP(t).KnownHosts }},
	} {
		other := storage
		bad.change(&other)
		opt := newSite(t).connect()
		opt.Storage = &other
		err := Connect(t.Context(), opt)
		wantError(t, err, ErrUnreachable)
	}
}

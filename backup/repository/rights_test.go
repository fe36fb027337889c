package repository

import (
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"

	"github.com/varve-io/varve/backup/repository/repotest/servers"
)

// tryWrite writes a block in a separate session.
func tryWrite(t *testing.T, r *Repository) error {
	t.Helper()
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		return err
	}
	_, err = w.WriteBlock(t.Context(), []byte(t.Name()))
	return errors.Join(err, w.Flush(t.Context()), w.Close())
}

// TestRights denies rights on each storage for which a test can run a real server. The
// error names the right; nothing is retried or left behind.
func TestRights(t *testing.T) {
	put := []string{http.MethodPut}
	remove := []string{http.MethodDelete}
	t.Run("s3", func(t *testing.T) {
		t.Parallel()
		address, rights := servers.StartS3Rights(t)
		if err := servers.S3Client(t, address).MakeBucket(t.Context(), "rights", minio.MakeBucketOptions{}); err != nil {
			t.Fatal(err)
		}
		storage := &S3{Bucket: "rights", Endpoint: address, DisableTLS: true, AccessKeyID: servers.S3AccessKey, SecretAccessKey: servers.S3SecretKey}
		opt := CreateOptions{ConnectOptions: newSite(t).connect()}
		opt.Storage = storage
		rights.Deny(http.MethodDelete)
		err := Create(t.Context(), opt)
		wantError(t, err, ErrDenied, "may not delete objects in S3 bucket rights", "docs/repository.md")
		if _, err := servers.S3Client(t, address).StatObject(t.Context(), "rights", "kopia.repository", minio.StatObjectOptions{}); err == nil {
			t.Error("a repository was made without the right to delete")
		}
		rights.Deny()
		deniedWrites(t, roundTrip(t, storage), rights, [][]string{put, remove, {put[0], remove[0]}})
	})
	t.Run("webdav", func(t *testing.T) {
		t.Parallel()
		dav := servers.StartWebDAV(t, t.TempDir())
		s := roundTrip(t, &WebDAV{URL: dav.URL, User: dav.User, Password: dav.Password})
		deniedWrites(t, s, &dav.Rights, [][]string{{http.MethodPut, "MKCOL", "MOVE"}, {http.MethodDelete}})
	})
	t.Run("sftp", func(t *testing.T) {
		t.Parallel()
		server := servers.StartSFTP(t)
		s := roundTrip(t, &SFTP{
			Host: server.Host, Port: server.Port, User: server.User, Password: server.Password,
			KnownHostsData: server.KnownHosts, Path: filepath.Join(t.TempDir(), "repository"),
		})
		server.ReadOnly()
		wantError(t, tryWrite(t, s.mustOpen(t)), ErrDenied, "may not delete objects in SFTP")
		wantError(t, s.mustOpen(t).CheckRights(t.Context()), ErrDenied, "may not write and delete objects in SFTP")
	})
}

// deniedWrites writes to a repository with each of the methods denied.
func deniedWrites(t *testing.T, s site, rights *servers.Rights, denials [][]string) {
	t.Helper()
	for _, methods := range denials {
		word := "write"
		if methods[0] == http.MethodDelete {
			word = "delete"
		}
		if len(methods) == 2 {
			word = "write and delete"
		}
		r := s.mustOpen(t)
		rights.Deny(methods...)
		err := tryWrite(t, r)
		wantError(t, err, ErrDenied)
		if n := rights.Denied(); n > 2 { // a directory may be left
			t.Errorf("without the right to %s: %d requests were denied: they were tried again", word, n)
		}
		if n := rights.Done(http.MethodPut); n > 0 {
			t.Errorf("without the right to %s: %d objects were written", word, n)
		}
		if strings.Contains(err.Error(), blob.ErrBlobNotFound.Error()) {
			t.Errorf("the storage's answer is lost: %v", err)
		}
		wantError(t, r.CheckRights(t.Context()), ErrDenied, "may not "+word+" objects")
		// Rights can be granted while a process runs.
		rights.Deny()
		if err := errors.Join(r.CheckRights(t.Context()), tryWrite(t, r)); err != nil {
			t.Errorf("with all rights again: %v", err)
		}
	}
}

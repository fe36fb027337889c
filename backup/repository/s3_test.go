package repository

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"

	"github.com/varve-io/varve/backup/repository/repotest/servers"
)

func TestS3(t *testing.T) {
	t.Parallel() // it waits for retries most of the time
	address := servers.StartS3(t)
	client := servers.S3Client(t, address)
	if err := client.MakeBucket(t.Context(), "plain", minio.MakeBucketOptions{}); err != nil {
		t.Fatal(err)
	}
	s := newSite(t)
	storage := S3{Bucket: "plain", Prefix: "varve/", Endpoint: address, DisableTLS: true, AccessKeyID: servers.S3AccessKey, SecretAccessKey: servers.S3SecretKey}
	opt := CreateOptions{ConnectOptions: s.connect()}
	opt.Storage = &storage

	wantError(t, Connect(t.Context(), opt.ConnectOptions), ErrNotInitialized, "varve repo create")
	if err := Create(t.Context(), opt); err != nil {
		t.Fatal(err)
	}
	wantError(t, Create(t.Context(), opt), ErrAlreadyExists)

	r := s.mustOpen(t)
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	block := bytes.Repeat([]byte("S3"), 64<<10)
	oid, err := w.WriteBlock(t.Context(), block)
	if err = errors.Join(err, w.Flush(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	if p, err := s.mustOpen(t).ReadObject(t.Context(), oid); err != nil || !bytes.Equal(p, block) {
		t.Errorf("read %d bytes: %v", len(p), err)
	}
	st, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.Cache.ContentLimit != DefaultContentCacheBytes || st.Cache.MetadataLimit != DefaultMetadataCacheBytes || st.Storage != "s3" {
		t.Errorf("status %+v", st)
	}

	denied := opt.ConnectOptions
	denied.Storage = &S3{Bucket: "plain", Endpoint: address, DisableTLS: true, AccessKeyID: servers.S3AccessKey, SecretAccessKey: "wrong-secret"}
	err = Connect(t.Context(), denied)
	wantError(t, err, ErrUnreachable)
	if strings.Contains(err.Error(), "wrong-secret") {
		t.Errorf("the secret key is in %q", err)
	}
	nowhere := opt.ConnectOptions
	nowhere.Storage = &S3{Bucket: "nosuchbucket", Endpoint: address, DisableTLS: true, AccessKeyID: servers.S3AccessKey, SecretAccessKey: servers.S3SecretKey}
	wantError(t, Connect(t.Context(), nowhere), ErrUnreachable, "does not exist")
	dead := opt.ConnectOptions
	dead.Storage = &S3{Bucket: "plain", Endpoint: "127.0.0.1:1", DisableTLS: true, AccessKeyID: servers.S3AccessKey, SecretAccessKey: servers.S3SecretKey}
	wantError(t, Connect(t.Context(), dead), ErrUnreachable, "127.0.0.1:1")

	locked := opt
	locked.Storage = &S3{Bucket: "plain", Prefix: "locked/", Endpoint: address, DisableTLS: true, AccessKeyID: servers.S3AccessKey, SecretAccessKey: servers.S3SecretKey}
	locked.Retention = Retention{Mode: "governance", Period: 30 * 24 * time.Hour}
	wantError(t, Create(t.Context(), locked), ErrInvalidOptions, "object lock")
}

func TestS3ObjectLock(t *testing.T) {
	address := servers.StartS3(t)
	client := servers.S3Client(t, address)
	if err := client.MakeBucket(t.Context(), "locked", minio.MakeBucketOptions{ObjectLocking: true}); err != nil {
		t.Fatal(err)
	}
	s := newSite(t)
	opt := CreateOptions{ConnectOptions: s.connect(), Retention: Retention{Mode: "compliance", Period: 30 * 24 * time.Hour}}
	opt.Storage = &S3{Bucket: "locked", Endpoint: address, DisableTLS: true, AccessKeyID: servers.S3AccessKey, SecretAccessKey: servers.S3SecretKey}
	if err := Create(t.Context(), opt); err != nil {
		t.Fatal(err)
	}
	r := s.mustOpen(t)
	st, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.Retention != (RetentionStatus{Mode: "COMPLIANCE", PeriodSeconds: 30 * 24 * 3600, Extended: true}) {
		t.Errorf("retention %+v", st.Retention)
	}
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	oid, err := w.WriteBlock(t.Context(), []byte("locked"))
	if err = errors.Join(err, w.Flush(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	r = s.mustOpen(t)
	state, err := r.StateOf(t.Context(), oid)
	if err != nil || state.Pack == "" {
		t.Fatalf("state %+v, %v", state, err)
	}
	locked := func() (mode string, until time.Time) {
		info, err := client.StatObject(t.Context(), "locked", state.Pack, minio.StatObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		until, err = time.Parse(time.RFC3339, info.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date"))
		if err != nil {
			t.Fatal(err)
		}
		return info.Metadata.Get("X-Amz-Object-Lock-Mode"), until
	}
	mode, until := locked()
	if mode != "COMPLIANCE" || time.Until(until) < 29*24*time.Hour {
		t.Errorf("pack %s: mode %s until %v", state.Pack, mode, until)
	}
	// Full maintenance does this to every pack.
	if w, err = r.NewWriter(t.Context(), "test"); err != nil {
		t.Fatal(err)
	}
	err = w.w.BlobStorage().ExtendBlobRetention(t.Context(), blob.ID(state.Pack), blob.ExtendOptions{
		RetentionMode: blob.Compliance, RetentionPeriod: 60 * 24 * time.Hour,
	})
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	if _, extended := locked(); !extended.After(until) {
		t.Errorf("lock until %v was not extended: %v", until, extended)
	}
	// The server deletes, except locked blobs.
	if _, err := client.PutObject(t.Context(), "locked", "free", bytes.NewReader([]byte("x")), 1, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	remove := func(name string) (n int, err error) {
		for v := range client.ListObjects(t.Context(), "locked", minio.ListObjectsOptions{Prefix: name, WithVersions: true}) {
			if v.Err != nil {
				t.Fatal(v.Err)
			}
			n++
			err = errors.Join(err, client.RemoveObject(t.Context(), "locked", v.Key, minio.RemoveObjectOptions{VersionID: v.VersionID}))
		}
		return n, err
	}
	if n, err := remove("free"); n != 1 || err != nil {
		t.Errorf("%d versions of an object without a lock: %v", n, err)
	}
	if n, err := remove(state.Pack); n != 1 || err == nil {
		t.Errorf("%d versions of a locked pack were deleted", n)
	}
}

package backup

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest/servers"
)

// TestNetworkStorages takes a volume through its life on each storage that a test
// can run a real server of: a full that is interrupted and run again, an
// increment, a restore, a prune, maintenance and a full verify.
func TestNetworkStorages(t *testing.T) {
	for name, storage := range map[string]func(t *testing.T) repository.Storage{
		"s3": func(t *testing.T) repository.Storage {
			address := servers.StartS3(t)
			if err := servers.S3Client(t, address).MakeBucket(t.Context(), "life", minio.MakeBucketOptions{}); err != nil {
				t.Fatal(err)
			}
			return &repository.S3{
				Bucket: "life", Prefix: "varve/", Endpoint: address, DisableTLS: true,
				AccessKeyID: servers.S3AccessKey, SecretAccessKey: servers.S3SecretKey,
			}
		},
		"sftp": func(t *testing.T) repository.Storage {
			s := servers.StartSFTP(t)
			return &repository.SFTP{
				Host: s.Host, Port: s.Port, User: s.User, Password: s.Password, KnownHostsData: s.KnownHosts,
				Path: filepath.Join(t.TempDir(), "repository"),
			}
		},
		"webdav": func(t *testing.T) repository.Storage {
			s := servers.StartWebDAV(t, t.TempDir())
			return &repository.WebDAV{URL: s.URL, User: s.User, Password: s.Password}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			storageLife(t, storage(t))
		})
	}
}

func storageLife(t *testing.T, storage repository.Storage) {
	conf := filepath.Join(t.TempDir(), "repository.config")
	if err := repository.Create(t.Context(), repository.CreateOptions{ConnectOptions: repository.ConnectOptions{
		ConfigFile: conf, Storage: storage, Password: "secret",
		Cache: repository.Cache{Directory: filepath.Join(t.TempDir(), "cache")},
	}}); err != nil {
		t.Fatal(err)
	}
	r := openRepo(t, conf)
	rng := rand.New(rand.NewPCG(51, 52))
	data := make([]byte, 2*blocktree.SegmentSize+4096)
	for i := range 3 {
		copy(data[i*blocktree.SegmentSize:], randomBytes(rng, 2<<20))
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	opt := Options{Volume: testVolume, Disk: &memDisk{data: data}, Workers: 2, CheckpointEvery: time.Nanosecond} // after each job
	opt.step = func(step string) {
		if step == "checkpoint" {
			cancel()
		}
	}
	if _, _, err := Run(ctx, r, opt); !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted backup: %v", err)
	}
	opt.step, opt.CheckpointEvery = nil, 0
	full, rec := mustBackup(t, openRepo(t, conf), opt)
	if rec.Stats.Uploaded > 3<<20 { // of 4 MiB and a page
		t.Errorf("%d bytes were uploaded after the interruption", rec.Stats.Uploaded)
	}
	before := bytes.Clone(data)
	data = bytes.Clone(data)
	copy(data[70<<20:], randomBytes(rng, 300_000))
	opt.Disk = &memDisk{data: data}
	next, _ := mustBackup(t, r, opt)
	for p, want := range map[*points.Point][]byte{full: before, next: data} {
		if !bytes.Equal(readPoint(t, r, p), want) {
			t.Errorf("%s reads back different", p.Name())
		}
	}
	if _, err := Prune(t.Context(), r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: testVolume.Cluster}); err != nil {
		t.Error(err)
	}
	maintainNow(t, r)
	fresh := openRepo(t, conf)
	if !bytes.Equal(readPoint(t, fresh, next), data) {
		t.Error("reads back different after maintenance")
	}
	if _, err := Verify(t.Context(), fresh, VerifyOptions{Read: 1}); err != nil {
		t.Error(err)
	}
}

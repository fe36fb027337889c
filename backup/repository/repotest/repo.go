// Package repotest makes real Kopia repositories for tests, in temporary
// directories, and breaks them: storage that fails, holds up, truncates, flips
// bits, loses and lags; packs that are rewritten or gone; objects as other
// tools write them. Tests only.
package repotest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/object"

	"github.com/varve-io/varve/backup/repository"
)

// Password is the password of every repository made here.
const Password = "repotest"

// Repo is a repository in a temporary directory.
type Repo struct {
	Dir        string // of the blobs
	ConfigFile string // of a connection without faults

	veleroConfig string // of Velero's own connection

	connections atomic.Int32
	rewrites    atomic.Int64
}

// memory is a file system in memory, on Linux.
const memory = "/dev/shm"

// Dir makes a directory for a repository that goes when the test ends: in
// memory where that can be had, for a repository syncs every blob, and a suite
// that makes hundreds would wait for the disk most of its time.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(memory, "varve-test-*")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove a test's repository: %v", err)
		}
	})
	return dir
}

// New makes a repository the way "varve repo create filesystem" does.
func New(t testing.TB) *Repo {
	t.Helper()
	dir := Dir(t)
	r := &Repo{Dir: filepath.Join(dir, "blobs"), ConfigFile: filepath.Join(dir, "config", "repository.config")}
	if err := repository.CreateFilesystem(t.Context(), r.Dir, r.ConfigFile, Password); err != nil {
		t.Fatalf("create repository: %v", err)
	}
	return r
}

// NewScrypt is New, with the key derived from the password as it is for users. Built
// for tests, Kopia makes new repositories with a mere hash, which costs no memory
// (kopia repo/format, format_blob_key_derivation_testing.go).
func NewScrypt(t testing.TB) *Repo {
	t.Helper()
	dir := Dir(t)
	r := &Repo{Dir: filepath.Join(dir, "blobs"), ConfigFile: filepath.Join(dir, "config", "repository.config")}
	st, err := filesystem.New(t.Context(), &filesystem.Options{Path: r.Dir}, true)
	if err != nil {
		t.Fatalf("storage: %v", err)
	}
	defer st.Close(context.WithoutCancel(t.Context()))
	opt := &repo.NewRepositoryOptions{FormatBlockKeyDerivationAlgorithm: "scrypt-65536-8-1"}
	opt.BlockFormat.Hash = repository.DefaultHash
	if err := repo.Initialize(t.Context(), st, opt, Password); err != nil {
		t.Fatalf("initialize: %v", err)
	}
	// What is left to do is what an interrupted create leaves.
	if err := repository.CreateFilesystem(t.Context(), r.Dir, r.ConfigFile, Password); err != nil {
		t.Fatalf("create repository: %v", err)
	}
	return r
}

// Open opens the repository; it is closed when the test ends.
func (r *Repo) Open(t testing.TB) *repository.Repository {
	t.Helper()
	return openConfig(t, r.ConfigFile)
}

func openConfig(t testing.TB, config string) *repository.Repository {
	t.Helper()
	out, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: config, Password: Password})
	if err != nil {
		t.Fatalf("open repository: %v", err)
	}
	t.Cleanup(func() {
		if err := out.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Errorf("close repository: %v", err)
		}
	})
	return out
}

// OpenFaulty opens the repository through storage that obeys the returned
// Faults, with caches of its own.
func (r *Repo) OpenFaulty(t testing.TB) (*repository.Repository, *Faults) {
	t.Helper()
	config, f := r.ConnectFaulty(t)
	return openConfig(t, config), f
}

// ConnectFaulty makes a connection through storage that obeys the returned
// Faults, and returns its configuration file.
func (r *Repo) ConnectFaulty(t testing.TB) (config string, f *Faults) {
	t.Helper()
	name := fmt.Sprintf("%s#%d", r.Dir, r.connections.Add(1))
	f = register(name)
	t.Cleanup(func() { unregister(name) })
	opt := storageOptions{Path: r.Dir, Name: name}
	st, err := openFaulty(t.Context(), &opt, false)
	if err != nil {
		t.Fatalf("open storage: %v", err)
	}
	dir := t.TempDir()
	config = filepath.Join(dir, "repository.config")
	if err := repo.Connect(t.Context(), config, st, Password, &repo.ConnectOptions{
		ClientOptions:  repo.ClientOptions{Username: "varve", Hostname: "repository"},
		CachingOptions: content.CachingOptions{CacheDirectory: filepath.Join(dir, "cache")},
	}); err != nil {
		t.Fatalf("connect: %v", err)
	}
	return config, f
}

// Write runs fn in a write session of Kopia's own, as another program would
// have one, and flushes.
func (r *Repo) Write(t testing.TB, fn func(ctx context.Context, w repo.DirectRepositoryWriter) error) {
	t.Helper()
	r.writeAt(t, time.Now, fn)
}

func (r *Repo) writeAt(t testing.TB, now func() time.Time, fn func(ctx context.Context, w repo.DirectRepositoryWriter) error) {
	t.Helper()
	r.with(t, r.ConfigFile, now, fn)
}

func (r *Repo) with(t testing.TB, config string, now func() time.Time, fn func(ctx context.Context, w repo.DirectRepositoryWriter) error) {
	t.Helper()
	rep, err := repo.Open(t.Context(), config, Password, &repo.Options{DisableRepositoryLog: true, TimeNowFunc: now})
	if err != nil {
		t.Fatalf("open with kopia: %v", err)
	}
	defer func() {
		if err := rep.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Errorf("close: %v", err)
		}
	}()
	direct, ok := rep.(repo.DirectRepository)
	if !ok {
		t.Fatal("not a direct repository")
	}
	if err := repo.DirectWriteSession(t.Context(), direct, repo.WriteSessionOptions{Purpose: "repotest"}, fn); err != nil {
		t.Fatalf("write with kopia: %v", err)
	}
}

// TurnQuickOff turns quick maintenance off, as its owner may, and sets when the next full one
// is due.
func (r *Repo) TurnQuickOff(t testing.TB, nextFull time.Time) {
	t.Helper()
	r.Write(t, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		p, err := maintenance.GetParams(ctx, w)
		if err != nil {
			return err
		}
		p.QuickCycle.Enabled = false
		if err := maintenance.SetParams(ctx, w, p); err != nil {
			return err
		}
		s, err := maintenance.GetSchedule(ctx, w)
		if err != nil {
			return err
		}
		s.NextFullMaintenanceTime = nextFull
		return maintenance.SetSchedule(ctx, w, s)
	})
}

// Object is bytes to be stored as stock Kopia would.
type Object struct {
	Data       []byte
	Splitter   string // "" for Kopia's default, "FIXED-1M", ...
	Compressor string // "" for none
}

// WriteObjects stores objects in one session, through Kopia's own writer.
func (r *Repo) WriteObjects(t testing.TB, objects ...Object) []repository.ObjectID {
	t.Helper()
	var out []repository.ObjectID
	r.Write(t, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		for _, o := range objects {
			oid, err := writeObject(ctx, w, o)
			if err != nil {
				return err
			}
			out = append(out, oid)
		}
		return nil
	})
	return out
}

func writeObject(ctx context.Context, w repo.DirectRepositoryWriter, o Object) (repository.ObjectID, error) {
	ow := w.NewObjectWriter(ctx, object.WriterOptions{
		Splitter: o.Splitter, Compressor: compression.Name(o.Compressor), MetadataCompressor: compression.Name(o.Compressor),
	})
	defer ow.Close()
	if _, err := ow.Write(o.Data); err != nil {
		return repository.ObjectID{}, err
	}
	return ow.Result()
}

// RewritePacks moves every content to new packs and deletes the old ones at
// once, as maintenance without safety margins does.
func (r *Repo) RewritePacks(t testing.TB) {
	t.Helper()
	old := r.Packs(t)
	// Of two index entries of one second Kopia takes either, so each rewrite
	// happens in a second of its own.
	ahead := time.Duration(r.rewrites.Add(1)) * 2 * time.Second
	now := func() time.Time { return time.Now().Add(ahead) }
	r.writeAt(t, now, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		opt := &maintenance.RewriteContentsOptions{Parallel: 2}
		if err := w.ContentReader().IterateContents(ctx, content.IterateOptions{}, func(i content.Info) error {
			opt.ContentIDs = append(opt.ContentIDs, i.ContentID)
			return nil
		}); err != nil {
			return err
		}
		_, err := maintenance.RewriteContents(ctx, w, opt, maintenance.SafetyNone)
		return err
	})
	r.writeAt(t, now, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		_, err := maintenance.DeleteUnreferencedPacks(ctx, w, maintenance.DeleteUnreferencedPacksOptions{}, maintenance.SafetyNone)
		return err
	})
	for _, id := range r.Packs(t) {
		if slices.Contains(old, id) {
			t.Fatalf("pack %s was not rewritten", id)
		}
	}
}

// Packs lists the data and metadata packs.
func (r *Repo) Packs(t testing.TB) []string {
	t.Helper()
	var out []string
	for id := range r.blobs(t) {
		if strings.HasPrefix(id, "p") || strings.HasPrefix(id, "q") {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// Indexes lists the blobs of Kopia's index.
func (r *Repo) Indexes(t testing.TB) []string {
	t.Helper()
	var out []string
	for id := range r.blobs(t) {
		if strings.HasPrefix(id, "x") {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// blobs maps blob IDs to files: kopia repo/blob/sharded puts the first
// characters into directories and ".f" behind the last.
func (r *Repo) blobs(t testing.TB) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(r.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".f") {
			return err
		}
		rel, err := filepath.Rel(r.Dir, path)
		out[strings.TrimSuffix(strings.ReplaceAll(rel, string(filepath.Separator), ""), ".f")] = path
		return err
	})
	if err != nil {
		t.Fatalf("list blobs: %v", err)
	}
	return out
}

// Size returns the bytes of all blobs.
func (r *Repo) Size(t testing.TB) int64 {
	t.Helper()
	var n int64
	for _, path := range r.blobs(t) {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		n += st.Size()
	}
	return n
}

// RemoveBlob deletes a blob behind Kopia's back.
func (r *Repo) RemoveBlob(t testing.TB, id string) {
	t.Helper()
	if err := os.Remove(r.BlobPath(t, id)); err != nil {
		t.Fatal(err)
	}
}

// DamageBlob flips one bit in each of a blob's 1000-byte stretches, or in the
// middle of a short one.
func (r *Repo) DamageBlob(t testing.TB, id string) {
	t.Helper()
	path := r.BlobPath(t, id)
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := min(500, len(p)/2); i < len(p); i += 1000 {
		p[i] ^= 1
	}
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TruncateBlob cuts bytes off the end of a blob.
func (r *Repo) TruncateBlob(t testing.TB, id string, bytes int64) {
	t.Helper()
	path := r.BlobPath(t, id)
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, max(0, st.Size()-bytes)); err != nil {
		t.Fatal(err)
	}
}

// BlobPath is the file that holds a blob.
func (r *Repo) BlobPath(t testing.TB, id string) string {
	t.Helper()
	path, ok := r.blobs(t)[id]
	if !ok {
		t.Fatalf("no blob %s", id)
	}
	return path
}

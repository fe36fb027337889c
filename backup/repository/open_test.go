package repository

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	kopiafs "github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/policy"
)

const testPassword = "correct horse"

// site is a directory for a repository and a configuration file.
type site struct {
	dir, config string
}

func newSite(t *testing.T) site {
	t.Helper()
	base := t.TempDir()
	return site{dir: filepath.Join(base, "repo"), config: filepath.Join(base, "client", "repository.config")}
}

func (s site) connect() ConnectOptions {
	return ConnectOptions{
		ConfigFile: s.config,
		Storage:    &Filesystem{Path: s.dir},
		Password:   testPassword,
		Cluster:    "test",
		Cache:      Cache{Directory: filepath.Join(filepath.Dir(s.config), "cache")},
	}
}

func (s site) create(t *testing.T) {
	t.Helper()
	if err := Create(t.Context(), CreateOptions{ConnectOptions: s.connect()}); err != nil {
		t.Fatal(err)
	}
}

func (s site) open(t *testing.T, password string) (*Repository, error) {
	t.Helper()
	r, err := Open(t.Context(), OpenOptions{ConfigFile: s.config, Password: password})
	if err == nil {
		t.Cleanup(func() {
			if err := r.Close(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	return r, err
}

func (s site) mustOpen(t *testing.T) *Repository {
	t.Helper()
	r, err := s.open(t, testPassword)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (s site) storage(t *testing.T) blob.Storage {
	t.Helper()
	st, err := (&Filesystem{Path: s.dir}).open(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close(context.Background()) })
	return st
}

// kopiaRepository makes a repository the way stock Kopia does.
func (s site) kopiaRepository(t *testing.T, version format.Version) {
	t.Helper()
	st := s.storage(t)
	opt := &repo.NewRepositoryOptions{}
	opt.BlockFormat.Version = version
	if err := repo.Initialize(t.Context(), st, opt, testPassword); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(t.TempDir(), "kopia.config")
	if err := repo.Connect(t.Context(), conf, st, testPassword, nil); err != nil {
		t.Fatal(err)
	}
	rep, err := repo.Open(t.Context(), conf, testPassword, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer rep.Close(t.Context())
	err = repo.WriteSession(t.Context(), rep, repo.WriteSessionOptions{}, func(ctx context.Context, w repo.RepositoryWriter) error {
		return policy.SetPolicy(ctx, w, policy.GlobalPolicySourceInfo, policy.DefaultPolicy)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// wantError checks the kind of an error and that it is one sentence which says
// what to do.
func wantError(t *testing.T, err, kind error, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v, want %v", err, kind)
	}
	text := err.Error()
	if strings.Contains(text, "\n") || !strings.ContainsAny(text, ":;") || len(text) > 500 {
		t.Errorf("not one sentence with an advice: %q", text)
	}
	if strings.Contains(text, testPassword) {
		t.Errorf("the password is in %q", text)
	}
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%q does not say %q", text, w)
		}
	}
}

func TestWaysToFail(t *testing.T) {
	s := newSite(t)
	_, err := s.open(t, testPassword)
	wantError(t, err, ErrNotConnected, "varve repo create")
	wantError(t, Connect(t.Context(), s.connect()), ErrUnreachable, "does not exist")
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	wantError(t, Connect(t.Context(), s.connect()), ErrNotInitialized, "varve repo create")

	s.create(t)
	before, err := os.ReadFile(s.config)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.open(t, "wrong")
	wantError(t, err, ErrWrongPassword)
	wrong := s.connect()
	wrong.Password = "wrong"
	wantError(t, Connect(t.Context(), wrong), ErrWrongPassword)
	wantError(t, Create(t.Context(), CreateOptions{ConnectOptions: s.connect()}), ErrAlreadyExists)
	wantError(t, Create(t.Context(), CreateOptions{ConnectOptions: wrong}), ErrAlreadyExists, "password")
	if after, err := os.ReadFile(s.config); err != nil || string(after) != string(before) {
		t.Errorf("failed attempts changed the configuration: %v", err)
	}

	// The blob that describes the repository is damaged, lost, and all is lost.
	file := filepath.Join(s.dir, "kopia.repository.f")
	intact, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, intact[:len(intact)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = s.open(t, testPassword)
	wantError(t, err, ErrIncompleteRepository, "kopia.repository")
	wantError(t, Connect(t.Context(), s.connect()), ErrIncompleteRepository, "kopia.repository")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	wantError(t, Connect(t.Context(), s.connect()), ErrIncompleteRepository, "kopia.repository")
	wantError(t, Create(t.Context(), CreateOptions{ConnectOptions: s.connect()}), ErrIncompleteRepository, "kopia.repository")
	_, err = s.open(t, testPassword)
	wantError(t, err, ErrNotInitialized)
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
	_, err = s.open(t, testPassword)
	wantError(t, err, ErrUnreachable, "mounted")
	if err := os.WriteFile(s.config, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = s.open(t, testPassword)
	wantError(t, err, ErrNotConnected)
}

func TestForeignRepositoriesAreReadOnly(t *testing.T) {
	for _, version := range []format.Version{1, 2, 3} {
		s := newSite(t)
		s.kopiaRepository(t, version)
		wantError(t, Create(t.Context(), CreateOptions{ConnectOptions: s.connect()}), ErrAlreadyExists, "Kopia")
		if err := Connect(t.Context(), s.connect()); err != nil {
			t.Fatal(err)
		}
		r := s.mustOpen(t)
		st, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if r.Writable() || st.Owned || st.Format != int(version) || !strings.Contains(st.ReadOnly, "Kopia") {
			t.Errorf("version %d: status %+v", version, st)
		}
		if _, err := r.NewWriter(t.Context(), "test"); !errors.Is(err, ErrReadOnly) {
			t.Errorf("version %d: writer: %v", version, err)
		}
		err = ChangePassword(t.Context(), OpenOptions{ConfigFile: s.config, Password: testPassword}, "new")
		if !errors.Is(err, ErrReadOnly) {
			t.Errorf("version %d: change password: %v", version, err)
		}
	}
}

func TestReadOnlyConnection(t *testing.T) {
	s := newSite(t)
	s.create(t)
	opt := s.connect()
	opt.ReadOnly = true
	if err := Connect(t.Context(), opt); err != nil {
		t.Fatal(err)
	}
	r := s.mustOpen(t)
	if _, err := r.NewWriter(t.Context(), "test"); r.Writable() || !errors.Is(err, ErrReadOnly) {
		t.Errorf("writable %v, writer: %v", r.Writable(), err)
	}
}

func TestReplacedRepositoryIsNoticed(t *testing.T) {
	s := newSite(t)
	opt := CreateOptions{ConnectOptions: s.connect()}
	opt.Cache.ContentBytes, opt.Cache.MetadataBytes = 8<<20, 8<<20 // an old cache that could mislead
	if err := Create(t.Context(), opt); err != nil {
		t.Fatal(err)
	}
	first, err := s.mustOpen(t).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
	elsewhere := site{dir: s.dir, config: filepath.Join(t.TempDir(), "other.config")}
	elsewhere.create(t)

	_, err = s.open(t, testPassword)
	wantError(t, err, ErrReplaced, "varve repo connect")
	if err := Connect(t.Context(), opt.ConnectOptions); err != nil {
		t.Fatal(err)
	}
	r := s.mustOpen(t)
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	oid, err := w.WriteBlock(t.Context(), []byte("written after the replacement"))
	if err = errors.Join(err, w.Flush(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	if p, err := elsewhere.mustOpen(t).ReadObject(t.Context(), oid); err != nil || string(p) != "written after the replacement" {
		t.Errorf("another client reads %q, %v", p, err)
	}
	if _, err := os.Stat(first.Cache.Directory); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the cache of the old repository is still there: %v", err)
	}
}

func TestUpgradeLockAndNewerRecord(t *testing.T) {
	s := newSite(t)
	s.create(t)
	r := s.mustOpen(t)
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	// A newer varve would have written only a newer record.
	recs, err := r.ListRecords(t.Context(), configKind, nil)
	if err != nil || len(recs) != 1 {
		t.Fatalf("records %v, %v", recs, err)
	}
	_, err = w.PutRecord(t.Context(), configKind, nil, Config{Format: 2})
	if err = errors.Join(err, w.DeleteRecord(t.Context(), recs[0].ID), w.Flush(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	_, err = s.open(t, testPassword)
	wantError(t, err, ErrNewerFormat, "newer")

	s = newSite(t)
	s.kopiaRepository(t, 2) // the newest version is never upgraded
	if err := Connect(t.Context(), s.connect()); err != nil {
		t.Fatal(err)
	}
	fm, err := format.NewManager(t.Context(), s.storage(t), "", 0, testPassword, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fm.SetUpgradeLockIntent(t.Context(), format.UpgradeLockIntent{
		OwnerID: "somebody", CreationTime: time.Now(), IODrainTimeout: time.Minute,
		StatusPollInterval: time.Second, Message: "upgrading", MaxPermittedClockDrift: time.Second,
	}); err != nil {
		t.Fatal(err)
	}
	_, err = s.open(t, testPassword)
	wantError(t, err, ErrUpgradeInProgress, "upgrad")
}

func TestExpireDeletesNothing(t *testing.T) {
	s := newSite(t)
	s.create(t)
	r := s.mustOpen(t)
	pol, _, _, err := policy.GetEffectivePolicy(t.Context(), r.rep, snapshot.SourceInfo{UserName: "shop", Host: "test", Path: "/db"})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	var manifests []*snapshot.Manifest
	for day := range 600 { // of which Kopia's default policy would keep ten
		at := kopiafs.UTCTimestampFromTime(start.AddDate(0, 0, day))
		manifests = append(manifests, &snapshot.Manifest{StartTime: at, EndTime: at})
	}
	pol.RetentionPolicy.ComputeRetentionReasons(manifests)
	for i, m := range manifests {
		if len(m.RetentionReasons) == 0 {
			t.Fatalf("snapshot %d of %d would be deleted", i, len(manifests))
		}
	}
}

package repository

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/snapshot/policy"
)

func TestCreatedRepository(t *testing.T) {
	s := newSite(t)
	s.create(t)
	r := s.mustOpen(t)
	if !r.Writable() || !r.Direct() || r.Cluster() != "test" {
		t.Errorf("writable %v, direct %v, cluster %q", r.Writable(), r.Direct(), r.Cluster())
	}
	if r.config.Format != 1 || r.config.Compression != DefaultCompression || r.config.PacksSince.IsZero() {
		t.Errorf("record %+v", r.config)
	}
	ctx := t.Context()
	if mine, err := maintenance.IsOwnedByThisUser(ctx, r.rep); err != nil || !mine {
		t.Errorf("maintenance owned: %v, %v", mine, err)
	}
	mp, err := r.direct.FormatManager().GetMutableParameters(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if e := mp.EpochParameters; e.MinEpochDuration != 6*time.Hour || e.EpochRefreshFrequency != 2*time.Hour {
		t.Errorf("epoch parameters %+v", e)
	}
	pol, err := policy.GetDefinedPolicy(ctx, r.rep, policy.GlobalPolicySourceInfo)
	if err != nil {
		t.Fatal(err)
	}
	if n := pol.RetentionPolicy.KeepLatest; n == nil || *n < 1<<30 {
		t.Errorf("policy keeps %v latest", n)
	}
	for _, f := range []string{s.config, sidePath(s.config)} {
		info, err := os.Stat(f)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, info.Mode(), err)
		}
	}
	p, err := os.ReadFile(s.config)
	if err != nil || strings.Contains(string(p), testPassword) {
		t.Errorf("configuration: %v, password in it: %v", err, strings.Contains(string(p), testPassword))
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(s.config), ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	// Lists read each directory: there are to be few, and every client has to know how many.
	if p, err := os.ReadFile(filepath.Join(s.dir, ".shards")); err != nil || !strings.Contains(string(p), `"default":[1,2]`) {
		t.Errorf("blobs are spread by %s: %v", p, err)
	}
	st, err := r.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !st.Owned || st.Cache.Directory != "" || st.Format != 3 || st.Compression != DefaultCompression || !st.Maintenance.Here || st.Capacity == nil {
		t.Errorf("status %+v", st)
	}
}

func TestOptionsReachTheRepository(t *testing.T) {
	s := newSite(t)
	opt := CreateOptions{ConnectOptions: s.connect(), Format: Format{
		Hash: "BLAKE3-256", Encryption: "CHACHA20-POLY1305-HMAC-SHA256", Compression: "off", ECCOverheadPercent: 2,
	}}
	opt.Limits.UploadBytesPerSecond = 1 << 20
	opt.Cache.ContentBytes, opt.Cache.MetadataBytes = 8<<20, 4<<20
	if err := Create(t.Context(), opt); err != nil {
		t.Fatal(err)
	}
	st, err := s.mustOpen(t).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.Hash != opt.Format.Hash || st.Encryption != opt.Format.Encryption || st.Compression != "off" || st.ECCPercent != 2 {
		t.Errorf("format %+v", st)
	}
	if st.Limits.UploadBytesPerSecond != 1<<20 || st.Cache.ContentLimit != 8<<20 || st.Cache.MetadataLimit != 4<<20 {
		t.Errorf("limits %+v, cache %+v", st.Limits, st.Cache)
	}
	if base := filepath.Base(st.Cache.Directory); base != st.UniqueID[:16] {
		t.Errorf("cache directory %s is not named after the repository %s", base, st.UniqueID)
	}
	if err := Disconnect(s.config); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(st.Cache.Directory); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("cache is still there: %v", err)
	}
	wantError(t, Disconnect(s.config), ErrNotConnected, "varve repo connect")
}

func TestInvalidOptionsTouchNothing(t *testing.T) {
	ret := func(mode string, period time.Duration) func(*CreateOptions) {
		return func(o *CreateOptions) { o.Retention = Retention{mode, period} }
	}
	for name, change := range map[string]func(*CreateOptions){
		"hash":             func(o *CreateOptions) { o.Format.Hash = "MD5" },
		"encryption":       func(o *CreateOptions) { o.Format.Encryption = "ROT13" },
		"compression":      func(o *CreateOptions) { o.Format.Compression = "rar" },
		"ecc":              func(o *CreateOptions) { o.Format.ECCOverheadPercent = 101 },
		"no password":      func(o *CreateOptions) { o.Password = "" },
		"negative limit":   func(o *CreateOptions) { o.Limits.UploadBytesPerSecond = -1 },
		"cluster":          func(o *CreateOptions) { o.Cluster = "a@b" },
		"read-only":        func(o *CreateOptions) { o.ReadOnly = true },
		"relative path":    func(o *CreateOptions) { o.Storage = &Filesystem{Path: "repo"} },
		"no storage":       func(o *CreateOptions) { o.Storage = nil },
		"half a retention": ret("governance", 0),
		"other half":       ret("", 90*24*time.Hour),
		"retention mode":   ret("forever", 90*24*time.Hour),
		"short retention":  ret("compliance", 47*time.Hour),
		"one cache size":   func(o *CreateOptions) { o.Cache.MetadataBytes = 1 << 20 },
		"S3 half a key":    func(o *CreateOptions) { o.Storage = &S3{Bucket: "b", AccessKeyID: "x"} },
		"S3 endpoint URL":  func(o *CreateOptions) { o.Storage = &S3{Bucket: "b", Endpoint: "https://x"} },
		"S3 past":          func(o *CreateOptions) { o.Storage = &S3{Bucket: "b", PointInTime: time.Unix(1, 0)} },
		"GCS credentials":  func(o *CreateOptions) { o.Storage = &GCS{Bucket: "b", CredentialsJSON: []byte("x")} },
		"Azure key":        func(o *CreateOptions) { o.Storage = &Azure{Container: "c", Account: "a"} },
		"B2 key":           func(o *CreateOptions) { o.Storage = &B2{Bucket: "b"} },
		"SFTP no key":      func(o *CreateOptions) { o.Storage = &SFTP{Host: "h", User: "u", Path: "/p"} },
		"SFTP two keys": func(o *CreateOptions) {
			o.Storage = &SFTP{Host: "h", User: "u", Path: "/p", KeyData: "k", Password: "p"}
		},
		"SFTP unknown host":  func(o *CreateOptions) { o.Storage = &SFTP{Host: "h", User: "u", Path: "/p", KeyData: "k"} },
		"WebDAV URL":         func(o *CreateOptions) { o.Storage = &WebDAV{URL: "ftp://h/p"} },
		"WebDAV secrets":     func(o *CreateOptions) { o.Storage = &WebDAV{URL: "https://u:p@h/p"} },
		"rclone is missing":  func(o *CreateOptions) { o.Storage = &Rclone{RemotePath: "r:p", Executable: "/nonexistent/rclone"} },
		"lock on filesystem": ret("governance", 90*24*time.Hour),
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			opt := CreateOptions{ConnectOptions: s.connect()}
			change(&opt)
			err := Create(t.Context(), opt)
			if !errors.Is(err, ErrInvalidOptions) {
				t.Fatalf("error %v", err)
			}
			if _, err := os.Stat(s.config); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("configuration was written: %v", err)
			}
			if _, err := os.Stat(filepath.Join(s.dir, "kopia.repository.f")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("repository was written: %v", err)
			}
		})
	}
}

func TestInterruptedCreateIsFinished(t *testing.T) {
	ctx := t.Context()
	initialize := func(t *testing.T, s site) {
		if err := repo.Initialize(ctx, s.storage(t), &repo.NewRepositoryOptions{}, testPassword); err != nil {
			t.Fatal(err)
		}
	}
	for name, stop := range map[string]func(t *testing.T, s site){
		"after kopia.blobcfg": func(t *testing.T, s site) {
			initialize(t, s)
			if err := os.Remove(filepath.Join(s.dir, "kopia.repository.f")); err != nil {
				t.Fatal(err)
			}
		},
		"after kopia.repository": initialize,
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			stop(t, s)
			wantError(t, Connect(ctx, s.connect()), ErrIncompleteRepository, "varve repo create")
			s.create(t)
			if r := s.mustOpen(t); !r.Writable() {
				t.Error(r.readOnlyReason())
			}
		})
	}
	s := newSite(t)
	initialize(t, s)
	other := CreateOptions{ConnectOptions: s.connect(), Format: Format{Hash: "BLAKE3-256"}}
	wantError(t, Create(ctx, other), ErrInvalidOptions, "BLAKE3-256")
	other = CreateOptions{ConnectOptions: s.connect()}
	other.Password = "another"
	wantError(t, Create(ctx, other), ErrAlreadyExists)
}

package repository

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/snapshot/policy"
)

// Config is what Varve keeps about a repository in the repository itself, so
// that every client of it agrees.
type Config struct {
	Format      int    `json:"format"`      // version of this record, 1
	Compression string `json:"compression"` // Kopia's name of the block compressor; empty for none
}

const configKind = "repository"

// OpenOptions tell how to open a connected repository.
type OpenOptions struct {
	ConfigFile string // written by Connect
	Password   string
}

// Open opens a repository that Connect connected.
func Open(ctx context.Context, opt OpenOptions) (*Repository, error) {
	r := &Repository{}
	rep, err := repo.Open(ctx, opt.ConfigFile, opt.Password, &repo.Options{
		DoNotWaitForUpgrade:  true,
		DisableRepositoryLog: true,
		OnFatalError: func(err error) {
			r.fatalMu.Lock()
			defer r.fatalMu.Unlock()
			r.fatal = err
		},
	})
	if err != nil {
		return nil, fmt.Errorf("open repository: %w", err)
	}
	r.rep = rep
	r.direct, _ = rep.(repo.DirectRepository)
	if err := r.loadConfig(ctx); err != nil {
		return nil, errors.Join(err, rep.Close(ctx))
	}
	return r, nil
}

func (r *Repository) loadConfig(ctx context.Context) error {
	recs, err := r.ListRecords(ctx, configKind, nil)
	if err != nil {
		return err
	}
	for _, rec := range recs {
		if _, err := r.LoadRecord(ctx, rec.ID, &r.config); err != nil {
			return err
		}
	}
	return nil
}

func (r *Repository) readOnlyReason() string { return "connect it again without --read-only" }

// CreateFilesystem makes a repository in a directory and connects to it.
func CreateFilesystem(ctx context.Context, dir, configFile, password string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	st, err := filesystem.New(ctx, &filesystem.Options{Path: dir}, true)
	if err != nil {
		return err
	}
	return createIn(ctx, st, configFile, password)
}

func createIn(ctx context.Context, st blob.Storage, configFile, password string) error {
	if err := repo.Initialize(ctx, st, &repo.NewRepositoryOptions{
		BlockFormat: format.ContentFormat{},
	}, password); err != nil {
		return err
	}
	if err := repo.Connect(ctx, configFile, st, password, &repo.ConnectOptions{
		ClientOptions:  repo.ClientOptions{Username: "varve", Hostname: "repository"},
		CachingOptions: content.CachingOptions{CacheDirectory: filepath.Join(filepath.Dir(configFile), "cache")},
	}); err != nil {
		return err
	}
	rep, err := repo.Open(ctx, configFile, password, &repo.Options{DisableRepositoryLog: true})
	if err != nil {
		return err
	}
	defer rep.Close(ctx)
	return repo.WriteSession(ctx, rep, repo.WriteSessionOptions{Purpose: "varve create"}, func(ctx context.Context, w repo.RepositoryWriter) error {
		p := maintenance.DefaultParams()
		p.Owner = rep.ClientOptions().UsernameAtHost()
		if err := maintenance.SetParams(ctx, w, &p); err != nil {
			return err
		}
		if err := policy.SetPolicy(ctx, w, policy.GlobalPolicySourceInfo, &policy.Policy{}); err != nil {
			return err
		}
		_, err := w.PutManifest(ctx, map[string]string{"type": recordType, "varve": configKind}, Config{Format: 1, Compression: "zstd-fastest"})
		return err
	})
}

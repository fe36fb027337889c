package repository

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/logging"
	"github.com/kopia/kopia/repo/manifest"
)

// Config is what Varve keeps about a repository in the repository itself, so
// that every client of it agrees.
type Config struct {
	Format      int    `json:"format"`      // version of this record, configFormat
	Compression string `json:"compression"` // Kopia's name of the block compressor; empty for none
}

const (
	configKind   = "repository"
	configFormat = 1
)

// OpenOptions tell how to open a connected repository.
type OpenOptions struct {
	ConfigFile string // written by Create or Connect, or by stock Kopia
	Password   string
	Log        *slog.Logger // what Kopia logs, at debug level; nil for nothing
	// Now is the clock that everything written is dated by; nil for the
	// machine's. Tests set hosts apart with it.
	Now func() time.Time
	// Timeout is how long the storage may be silent, asked for something, until the
	// repository is open; 0 for OpenTimeout.
	Timeout time.Duration
	// Turn to derive the repository's key; nil for at once.
	Turn Turn
	// Grace is how long a write session goes on after its context was
	// cancelled; 0 for DefaultGrace.
	Grace time.Duration
}

// Open opens a repository that Create or Connect connected. The error wraps
// one of the sentinels of this package and says what to do. A storage that is
// silent for OpenTimeout is ErrUnreachable; a slow one may take its time.
func Open(ctx context.Context, opt OpenOptions) (*Repository, error) {
	side, err := readSideFile(opt.ConfigFile)
	if err != nil {
		return nil, err
	}
	return open(ctx, opt, side)
}

// open is Open with what is remembered of the connection, which is empty for
// a connection made by stock Kopia.
func open(ctx context.Context, opt OpenOptions, side sideFile) (*Repository, error) {
	return openWithin(ctx, opt, side, func(ctx context.Context, r *Repository) error {
		found, err := r.loadConfig(ctx)
		if err == nil && !found {
			err = r.withoutConfig(ctx, side)
		}
		return err
	})
}

// openWithin opens the Kopia repository and calls check, both bounded by the
// storage's silence. A storage may hang without a look at its context, as a directory of a
// dead NFS server does: then it is left behind, to be closed should it ever come
// back, for the process is about to end.
func openWithin(ctx context.Context, opt OpenOptions, side sideFile, check func(context.Context, *Repository) error) (*Repository, error) {
	lc, err := readConnection(opt.ConfigFile)
	if err != nil {
		return nil, err
	}
	octx, settled, release := boundSilence(ctx, cmp.Or(opt.Timeout, OpenTimeout))
	octx, over := withTurn(octx, opt.Turn)
	r, err := answered(octx, func() (*Repository, error) {
		if lc.APIServer != nil { // calls no storage of ours: it is one call
			silenceOf(octx).begin()
			defer silenceOf(octx).end(false)
		}
		r, err := openKopia(octx, lc, opt, side)
		if err != nil {
			return nil, err
		}
		if err := check(octx, r); err != nil {
			return nil, errors.Join(err, r.Close(context.WithoutCancel(ctx)))
		}
		return r, nil
	}, func(r *Repository) { _ = r.Close(context.WithoutCancel(ctx)) })
	settled()
	over()
	if err != nil {
		if context.Cause(octx) != nil {
			err = explain(octx, placeOf(lc), err)
		}
		release()
		return nil, err
	}
	r.release = release
	return r, nil
}

// answered returns what do returns, or, shortly after ctx ended, the cause of
// that; late gets what do returns all the same.
func answered[T any](ctx context.Context, do func() (T, error), late func(T)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := do()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
	}
	// Whoever heeds the context is done in a moment, and knows more.
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	select {
	case r := <-done:
		return r.v, r.err
	case <-timer.C:
	}
	go func() {
		if r := <-done; r.err == nil {
			late(r.v)
		}
	}()
	var none T
	return none, context.Cause(ctx)
}

// tryUnfinished opens a repository that Varve's record is still missing from.
func (c *connection) tryUnfinished(ctx context.Context, opt ConnectOptions) (*Repository, error) {
	temp, err := writeTemp(opt.ConfigFile, c.lc)
	if err != nil {
		return nil, err
	}
	defer os.Remove(temp)
	return openWithin(ctx, OpenOptions{ConfigFile: temp, Password: opt.Password, Log: opt.Log, Turn: opt.Turn}, c.side,
		func(context.Context, *Repository) error { return nil })
}

// openKopia opens the Kopia repository, whoever made it. The storage keeps ctx.
func openKopia(ctx context.Context, lc *repo.LocalConfig, opt OpenOptions, side sideFile) (*Repository, error) {
	r := &Repository{place: placeOf(lc), cluster: side.Cluster, release: func() {}, grace: cmp.Or(opt.Grace, DefaultGrace)}
	r.clocks.now = time.Now
	if opt.Now != nil {
		r.clocks.now = opt.Now
	}
	rep, err := repo.Open(logging.WithLogger(withClocks(ctx, &r.clocks), kopiaLog(opt.Log)), opt.ConfigFile, opt.Password, &repo.Options{
		DoNotWaitForUpgrade:  true,
		DisableRepositoryLog: true,
		TimeNowFunc:          opt.Now,
		OnFatalError: func(err error) {
			r.fatalMu.Lock()
			defer r.fatalMu.Unlock()
			r.fatal = err
		},
	})
	if err != nil {
		err = explain(ctx, r.place, err)
		if side.UniqueID != "" && errors.Is(err, ErrNotInitialized) {
			err = &stateError{kind: ErrNotInitialized, cause: err, text: fmt.Sprintf(
				"the repository is gone from %s, where it was when this machine connected: check whether what it is stored on is mounted, and is the right one", r.place)}
		}
		return nil, err
	}
	r.rep = rep
	if direct, ok := rep.(repo.DirectRepository); ok {
		m, err := newManifestRepository(direct)
		if err != nil {
			return nil, errors.Join(err, rep.Close(context.WithoutCancel(ctx)))
		}
		r.rep, r.direct = m, m
	}
	if r.direct != nil && side.UniqueID != "" && hexID(r.direct.UniqueID()) != side.UniqueID {
		err := &stateError{kind: ErrReplaced, text: fmt.Sprintf(
			"another repository stands in %s than the one connected: if that is meant, run 'varve repo connect' again", r.place)}
		return nil, errors.Join(err, r.Close(context.WithoutCancel(ctx)))
	}
	if r.cluster == "" {
		if r.cluster, err = defaultCluster(); err != nil {
			return nil, errors.Join(err, r.Close(context.WithoutCancel(ctx)))
		}
	}
	return r, nil
}

func defaultCluster() (string, error) {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "", fmt.Errorf("this machine has no host name to go by: give --cluster: %w", err)
	}
	short, _, _ := strings.Cut(strings.ToLower(name), ".")
	return short, nil
}

// loadConfig reads Varve's record. Should there be several, for two creates
// finished one repository together, the first counts for everybody.
func (r *Repository) loadConfig(ctx context.Context) (found bool, err error) {
	recs, err := r.ListRecords(ctx, configKind, nil)
	if err != nil || len(recs) == 0 {
		return false, err
	}
	first := slices.MinFunc(recs, func(a, b Record) int {
		if c := a.Written.Compare(b.Written); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	if found, err = r.LoadRecord(ctx, first.ID, &r.config); err != nil {
		return false, err
	}
	if r.config.Format > configFormat {
		return false, &stateError{kind: ErrNewerFormat, text: fmt.Sprintf(
			"the repository in %s was made by a newer version of varve (record %d, this version knows %d): use a newer varve", r.place, r.config.Format, configFormat)}
	}
	return found, nil
}

// withoutConfig decides what a repository without Varve's record is: one of Kopia
// or Velero, one whose creation stopped half-way (stock clients write manifests
// at once too), or one of Varve whose record cannot be read.
func (r *Repository) withoutConfig(ctx context.Context, side sideFile) error {
	if r.direct == nil {
		r.foreign = true // a server shows its users what is theirs only
		return nil
	}
	all, err := r.findManifests(ctx, nil)
	if err != nil {
		return fmt.Errorf("list manifests: %w", err)
	}
	unreadable, err := r.UnreadableManifests(ctx)
	if err != nil {
		return err
	}
	switch {
	case len(unreadable) == 0 && len(all) == 0:
		return incompleteError(r.place)
	case len(unreadable) == 0:
		r.foreign = true
		return nil
	}
	// A connection that may write was made by Create, or to a repository of Varve.
	ours := side.UniqueID != "" && !r.rep.ClientOptions().ReadOnly ||
		slices.ContainsFunc(all, func(e *manifest.EntryMetadata) bool {
			return e.Labels[manifest.TypeLabelKey] == recordType || e.Labels[tagPrefix+recordType] != ""
		})
	if !ours {
		r.foreign = true
		return nil
	}
	r.config = Config{Format: configFormat, Compression: DefaultCompression}
	slog.WarnContext(ctx, "the repository's own settings cannot be read; new blocks are compressed by default",
		"compression", DefaultCompression, "next", "varve verify")
	return nil
}

// Cluster is the name of this cluster or machine in the repository.
func (r *Repository) Cluster() string { return r.cluster }

func (r *Repository) readOnlyReason() string {
	switch {
	case r.direct == nil:
		return "it is reached through a Kopia server, which Varve only reads from; connect to its storage to write"
	case r.foreign:
		return "it was made by Kopia or Velero; its disks can be listed, read and restored, and backed up to a repository made by 'varve repo create'"
	default:
		return "connect to it again without --read-only"
	}
}

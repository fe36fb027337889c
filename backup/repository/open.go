package repository

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/logging"
	"github.com/kopia/kopia/repo/manifest"
	"golang.org/x/sync/semaphore"
)

// Config is Varve's record about a repository, stored in the repository so that all its
// clients agree.
type Config struct {
	Format      int    `json:"format"`      // version of this record, configFormat
	Compression string `json:"compression"` // Kopia's name of the block compressor; empty for none
	// PacksSince is when maintenance began to record the packs that it empties: since
	// then they can be distinguished from packs of a lost index. It is zero in
	// repositories of older versions that were not maintained since.
	PacksSince time.Time `json:"packsSince,omitzero"`
}

const (
	configKind   = "repository"
	configFormat = 1
)

// OpenOptions say how to open a connected repository.
type OpenOptions struct {
	ConfigFile string // written by Create or Connect, or by stock Kopia
	Password   string
	Log        *slog.Logger // events that are no errors, and at debug level Kopia's log; nil for none
	// Now is the clock that dates all that is written; nil for the machine's. Tests use
	// it to give hosts different clocks.
	Now func() time.Time
	// Timeout is how long the storage may leave a request unanswered until the repository
	// is open; 0 for OpenTimeout.
	Timeout time.Duration
	// Turn bounds the derivation of the repository's key; nil for no bound.
	Turn Turn
	// FromStorage ignores the copies of small blobs in the storage (docs/format.md); for
	// callers that look for damage.
	FromStorage bool
	badCopies   bool // the copies are not to be read, and are replaced
	// Grace is how long a write session continues after its context was cancelled; 0 for
	// DefaultGrace.
	Grace time.Duration
}

// Open opens a repository that Create or Connect connected. The error wraps one of the
// sentinels of this package and says what to do. It is ErrUnreachable if the storage is
// silent for OpenTimeout; a slow storage is not an error.
func Open(ctx context.Context, opt OpenOptions) (*Repository, error) {
	side, err := readSideFile(opt.ConfigFile)
	if err != nil {
		return nil, err
	}
	return open(ctx, opt, side)
}

// open is Open with Varve's data about the connection, which is empty for one made by
// stock Kopia.
func open(ctx context.Context, opt OpenOptions, side sideFile) (*Repository, error) {
	return openWithin(ctx, opt, side, func(ctx context.Context, r *Repository) error {
		found, err := r.loadConfig(ctx)
		if err == nil && !found {
			err = r.withoutConfig(ctx, side)
		}
		return err
	})
}

// openWithin opens the Kopia repository and calls check, both bounded by the storage's
// silence. A storage may hang and ignore its context, as a directory of a dead NFS server
// does. It is abandoned then, and closed if it ever returns, since the process is about to
// end.
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

// answered returns do's result, or, shortly after ctx ended, the cause of that; late gets
// do's result in that case.
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
	// A call that checks its context returns in a moment, with a better error.
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

// tryUnfinished opens a repository that has no Varve record yet.
func (c *connection) tryUnfinished(ctx context.Context, opt ConnectOptions) (*Repository, error) {
	temp, err := writeTemp(opt.ConfigFile, c.lc)
	if err != nil {
		return nil, err
	}
	defer os.Remove(temp)
	return openWithin(ctx, OpenOptions{ConfigFile: temp, Password: opt.Password, Log: opt.Log, Turn: opt.Turn}, c.side,
		func(context.Context, *Repository) error { return nil })
}

// openKopia opens the Kopia repository, made by Varve or not. The storage keeps ctx.
func openKopia(ctx context.Context, lc *repo.LocalConfig, opt OpenOptions, side sideFile) (*Repository, error) {
	r := &Repository{place: placeOf(lc), cluster: side.Cluster, release: func() {}, grace: cmp.Or(opt.Grace, DefaultGrace),
		log: cmp.Or(opt.Log, slog.New(slog.DiscardHandler))}
	r.clocks.now, r.clocks.log = time.Now, r.log
	if opt.Now != nil {
		r.clocks.now = opt.Now
	}
	if !lc.ReadOnly {
		r.notes = newSessionNotes(opt.ConfigFile, r.log)
	}
	r.uncached = cacheDir(lc) == ""
	r.decoding = semaphore.NewWeighted(int64(decodedAtOnce * runtime.GOMAXPROCS(0)))
	if readsRuns(lc) {
		r.runs = newPackRuns()
	}
	if lc.Storage != nil {
		r.near = newNear(lc, r.clocks.now, opt)
	}
	kctx := withNear(withRuns(withNotes(withClocks(ctx, &r.clocks), r.notes), r.runs), r.near)
	rep, err := repo.Open(logging.WithLogger(kctx, kopiaLog(opt.Log)), opt.ConfigFile, opt.Password, &repo.Options{
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
		if errors.Is(err, ErrContentCorrupt) && r.near != nil && !opt.badCopies && r.near.recent.doubt() {
			r.log.WarnContext(ctx, "the copies of index blobs in the storage may be damaged; they are replaced", "blob", string(recentID), "error", err)
			opt.badCopies = true
			return openKopia(ctx, lc, opt, side)
		}
		err = diagnose(ctx, lc, side, r.place, err)
		if side.UniqueID != "" && errors.Is(err, ErrNotInitialized) {
			err = &stateError{kind: ErrNotInitialized, cause: err, text: fmt.Sprintf(
				"the repository is no longer in %s: check that its storage is mounted, and is the right one", r.place)}
		}
		return nil, err
	}
	r.rep = rep
	if direct, ok := rep.(repo.DirectRepository); ok {
		m, err := newManifestRepository(direct, r.log)
		if err != nil {
			return nil, errors.Join(err, rep.Close(context.WithoutCancel(ctx)))
		}
		r.rep, r.direct = m, m
	}
	if r.direct != nil && side.UniqueID != "" && hexID(r.direct.UniqueID()) != side.UniqueID {
		err := &stateError{kind: ErrReplaced, text: fmt.Sprintf(
			"%s holds another repository than the one connected: if that is intended, run 'varve repo connect' again", r.place)}
		return nil, errors.Join(err, r.Close(context.WithoutCancel(ctx)))
	}
	if r.cluster == "" {
		if r.cluster, err = defaultCluster(); err != nil {
			return nil, errors.Join(err, r.Close(context.WithoutCancel(ctx)))
		}
	}
	return r, nil
}

// readsRuns reports whether runs of packs are fetched: not from local storage, and not if
// the user limits reads, which Kopia counts above the storage.
func readsRuns(lc *repo.LocalConfig) bool {
	if lc.Storage == nil || isLocal(unguarded(*lc.Storage)) {
		return false
	}
	l := limitsOf(lc.Throttling)
	return l.DownloadBytesPerSecond == 0 && l.ReadsPerSecond == 0 && l.ConcurrentReads == 0
}

func defaultCluster() (string, error) {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "", fmt.Errorf("this machine has no host name: give --cluster: %w", err)
	}
	short, _, _ := strings.Cut(strings.ToLower(name), ".")
	return short, nil
}

// loadConfig loads Varve's record.
func (r *Repository) loadConfig(ctx context.Context) (found bool, err error) {
	c, found, err := r.readConfig(ctx)
	if err != nil || !found {
		return false, err
	}
	r.config = c
	return true, nil
}

// AccountSince is when a version that keeps records of deletions first used the
// repository; zero if that is not known.
func (r *Repository) AccountSince() time.Time { return r.config.PacksSince }

// readConfig reads Varve's record. If there are several, because two creates finished one
// repository, the first counts for all clients.
func (r *Repository) readConfig(ctx context.Context) (c Config, found bool, err error) {
	recs, err := r.ListRecords(ctx, configKind, nil)
	if err != nil || len(recs) == 0 {
		return c, false, err
	}
	first := slices.MinFunc(recs, func(a, b Record) int {
		if c := a.Written.Compare(b.Written); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	if found, err = r.LoadRecord(ctx, first.ID, &c); err != nil {
		return c, false, err
	}
	if c.Format > configFormat {
		return c, false, &stateError{kind: ErrNewerFormat, text: fmt.Sprintf(
			"the repository in %s was made by a newer version of varve (record %d, this version knows %d): use a newer varve", r.place, c.Format, configFormat)}
	}
	return c, found, nil
}

// withoutConfig classifies a repository without Varve's record: one of Kopia or Velero,
// one whose creation was interrupted (stock clients write manifests at once too), or one
// of Varve whose record is lost.
func (r *Repository) withoutConfig(ctx context.Context, side sideFile) error {
	if r.direct == nil {
		r.foreign = true // a server shows a user only that user's snapshots
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
	// A connection that may write was made by Create, or to a repository of Varve.
	wasOurs := side.UniqueID != "" && !side.trial && !r.rep.ClientOptions().ReadOnly
	switch {
	case len(all) == 0 && len(unreadable) == 0 && wasOurs:
		return &stateError{kind: ErrContentMissing, text: fmt.Sprintf(
			"the index of the repository in %s is empty, though it was in use: its index blobs (x…) are lost. Put them back from a copy of the storage, "+
				"or run 'varve repo repair', which finds in the packs what they listed", r.place)}
	case len(all) == 0 && len(unreadable) == 0:
		return incompleteError(r.place)
	case wasOurs, slices.ContainsFunc(all, isOurs):
	default:
		r.foreign = true
		return nil
	}
	r.config = Config{Format: configFormat, Compression: DefaultCompression}
	r.log.WarnContext(ctx, "the repository's own settings are lost or cannot be read; new blocks are compressed by default",
		"compression", DefaultCompression, "next", "varve repo repair")
	return nil
}

// isOurs recognises a manifest that Varve wrote.
func isOurs(e *manifest.EntryMetadata) bool {
	return e.Labels[manifest.TypeLabelKey] == recordType || e.Labels[tagPrefix+recordType] != ""
}

// Log receives events that are no errors, of the repository and of work on it; it is
// OpenOptions.Log, and never nil.
func (r *Repository) Log() *slog.Logger { return r.log }

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

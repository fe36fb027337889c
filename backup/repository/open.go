package repository

import (
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
}

// Open opens a repository that Create or Connect connected. The error wraps
// one of the sentinels of this package and says what to do. A storage that
// does not answer within OpenTimeout is ErrUnreachable.
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
	r, err := openKopia(ctx, opt, side)
	if err != nil {
		return nil, err
	}
	found, err := r.loadConfig(ctx)
	if err == nil && !found {
		if r.foreign, err = r.hasOtherManifests(ctx); err == nil && !r.foreign {
			err = incompleteError(r.place)
		}
	}
	if err != nil {
		return nil, errors.Join(err, r.Close(context.WithoutCancel(ctx)))
	}
	return r, nil
}

// tryUnfinished opens a repository that Varve's record is still missing from.
func (c *connection) tryUnfinished(ctx context.Context, opt ConnectOptions) (*Repository, error) {
	temp, err := writeTemp(opt.ConfigFile, c.lc)
	if err != nil {
		return nil, err
	}
	defer os.Remove(temp)
	return openKopia(ctx, OpenOptions{ConfigFile: temp, Password: opt.Password, Log: opt.Log}, c.side)
}

// openKopia opens the Kopia repository, whoever made it.
func openKopia(ctx context.Context, opt OpenOptions, side sideFile) (*Repository, error) {
	lc, err := readConnection(opt.ConfigFile)
	if err != nil {
		return nil, err
	}
	r := &Repository{place: placeOf(lc), cluster: side.Cluster}
	octx, settled, release := withDeadline(ctx, OpenTimeout)
	rep, err := repo.Open(logging.WithLogger(octx, kopiaLog(opt.Log)), opt.ConfigFile, opt.Password, &repo.Options{
		DoNotWaitForUpgrade:  true,
		DisableRepositoryLog: true,
		TimeNowFunc:          opt.Now,
		OnFatalError: func(err error) {
			r.fatalMu.Lock()
			defer r.fatalMu.Unlock()
			r.fatal = err
		},
	})
	settled()
	if err != nil {
		err = explain(octx, r.place, err)
		release()
		return nil, err
	}
	r.rep, r.release = rep, release
	r.direct, _ = rep.(repo.DirectRepository)
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

// hasOtherManifests tells a repository in use by others from one whose
// creation stopped half-way: stock clients write manifests at once too.
func (r *Repository) hasOtherManifests(ctx context.Context) (bool, error) {
	if r.direct == nil {
		return true, nil // a server shows its users what is theirs only
	}
	all, err := r.rep.FindManifests(ctx, nil)
	if err != nil {
		return false, fmt.Errorf("list manifests: %w", err)
	}
	return len(all) > 0, nil
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

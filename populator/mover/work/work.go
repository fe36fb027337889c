// Package work runs in a mover's pod: it executes one Task with the pod's block device
// and repository, and returns a Result. It does not use the Kubernetes API.
package work

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

// Environment describes the pod in which the work is done. Tests use other paths.
type Environment struct {
	Device    string // path of the block device
	StoreDir  string // with the store's credentials
	Scratch   string // writable
	ConfigDir string // writable, in memory; empty for Scratch
	VolumeDir string // claim of a volume storage
	Socket    string // where a stream comes in, or goes out
	// Log receives lines of progress.
	Log io.Writer
	// Logger receives what is no error, and why work failed; nil for none.
	Logger *slog.Logger
	// Probe names the file system that a disk of size bytes holds, in blkid's words. An
	// error means that none is known.
	Probe func(r io.ReaderAt, size int64) (string, error)
	// Version of Varve, for the record.
	Version string

	pulse *pulse // of work that is watched
}

// Pod is the environment of a mover's pod.
func Pod(probe func(io.ReaderAt, int64) (string, error), version string, logger *slog.Logger) Environment {
	return Environment{
		Device: mover.DevicePath, StoreDir: mover.StoreDir, Scratch: mover.ScratchDir, ConfigDir: mover.ConfigDir, VolumeDir: mover.VolumeDir, Socket: mover.StreamSocket,
		Log: os.Stdout, Logger: logger, Probe: probe, Version: version,
	}
}

// action executes a Task with an open repository.
type action func(ctx context.Context, e Environment, t mover.Task, repo *store.Open) (mover.Result, error)

var actions = map[mover.Action]action{
	mover.ActionBackup:   makePoint,
	mover.ActionRestore:  restore,
	mover.ActionMaintain: maintain,
	mover.ActionDump:     dump,
	mover.ActionFeed:     feed,
}

// Run executes a Task. It always returns a Result, with the reason if it failed. If ctx
// ends (SIGTERM), as much as possible of the work is kept for the next attempt.
func Run(ctx context.Context, e Environment, t mover.Task) mover.Result {
	var r mover.Result
	var err error
	e.Logger = cmp.Or(e.Logger, slog.New(slog.DiscardHandler))
	if t.Action == mover.ActionRestore { // whose user waits, and must be informed
		r, err = watch(ctx, e.Logger, prober(e, t), func(ctx context.Context, p *pulse) (mover.Result, error) {
			e := e
			e.pulse = p
			return run(ctx, e, t)
		})
	} else {
		r, err = run(ctx, e, t)
	}
	if err != nil {
		e.Logger.ErrorContext(ctx, "failed", "action", string(t.Action), "error", err)
		restored := r.Restore // size of the device, for a short one
		r = failure(ctx, err)
		r.Restore = restored
	}
	r.Version = mover.ProtocolVersion
	return r
}

func run(ctx context.Context, e Environment, t mover.Task) (r mover.Result, err error) {
	do := actions[t.Action]
	if do == nil {
		return r, fmt.Errorf("this version of Varve has no mover for %q", t.Action)
	}
	c, err := store.ReadCredentials(e.StoreDir)
	if err != nil {
		return r, err
	}
	repo, err := t.Store.Open(ctx, store.OpenOptions{Credentials: c, Dir: e.Scratch, ConfigDir: e.ConfigDir, VolumeDir: e.VolumeDir, MetadataBytes: 512 << 20, Log: e.Logger})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	if r, err = do(ctx, e, t, repo); err == nil {
		r.OK = true
	}
	if r.KeepError != "" {
		r.KeepError = repo.Redact(errors.New(r.KeepError)).Error()
		e.Logger.ErrorContext(ctx, "retention could not be applied", "error", r.KeepError)
	}
	return r, repo.Redact(err)
}

// reasoned is an error with its condition reason.
type reasoned struct {
	reason string
	again  bool
	err    error
}

func (e *reasoned) Error() string { return e.err.Error() }
func (e *reasoned) Unwrap() error { return e.err }

// failure turns an error into a Result.
func failure(ctx context.Context, err error) mover.Result {
	r := mover.Result{Reason: v1alpha1.ReasonMoverFailed, Message: err.Error(), Again: true}
	var own *reasoned
	switch {
	case errors.As(err, &own):
		r.Reason, r.Again = own.reason, own.again
	case ctx.Err() != nil:
		r.Message = "the mover was terminated: " + err.Error()
	case errors.Is(err, backup.ErrSourceLied):
		r.Reason, r.Again = v1alpha1.ReasonSourceLied, false
	case errors.Is(err, cbt.ErrDenied):
		r.Again = false
	case errors.Is(err, disk.ErrSizeChanged):
		r.Reason = v1alpha1.ReasonDeviceShort
	default:
		if reason, again := store.Reason(err); reason != v1alpha1.ReasonStoreNotReady {
			r.Reason, r.Again = reason, again
		}
	}
	return r
}

// openDevice explains why a device cannot be read.
func openDevice(ctx context.Context, path string) (source.Session, error) {
	session, err := source.Open(ctx, path, source.Options{})
	switch {
	case err == nil:
		return session, nil
	case errors.Is(err, os.ErrPermission):
		return nil, &reasoned{v1alpha1.ReasonDeviceNotReadable, false, fmt.Errorf(
			"%w: the mover may not read its block device; movers run as user 0 unless mover.nonRoot is set, which needs device_ownership_from_security_context in the container runtime", err)}
	case errors.Is(err, os.ErrNotExist), errors.Is(err, disk.ErrNotADisk):
		return nil, &reasoned{v1alpha1.ReasonDeviceNotReadable, true, fmt.Errorf("the pod has no block device: %w", err)}
	}
	return nil, fmt.Errorf("open the device: %w", err)
}

// progressEvery is the time between two lines of progress.
const progressEvery = 5 * time.Second

// reporter writes progress as lines, the first at once. Safe for concurrent use.
type reporter struct {
	w    io.Writer
	mu   sync.Mutex
	last time.Time
	was  string
}

// Tell writes p if it is time for it or if it begins another phase.
func (r *reporter) Tell(p mover.Progress) {
	if r.w == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); p.Phase != r.was || now.Sub(r.last) >= progressEvery || p.Total > 0 && p.Done == p.Total {
		r.last, r.was = now, p.Phase
		// A log without a reader is no reason to fail.
		_, _ = fmt.Fprintln(r.w, p.Line())
	}
}

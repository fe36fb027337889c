// Package work is what runs in a mover's pod: it does what one Task says with the block
// device and the repository that the pod was given, and answers with a Result. It knows
// no Kubernetes API.
package work

import (
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
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
)

// Environment is the pod that the work is done in. Tests give places of their own.
type Environment struct {
	Device    string // path of the block device
	StoreDir  string // with the store's credentials
	Scratch   string // writable
	ConfigDir string // writable, in memory; empty for Scratch
	VolumeDir string // claim of a volume storage
	// Log takes lines of progress.
	Log io.Writer
	// Probe names the file system that a disk of size bytes holds, in blkid's words. An
	// error means that none is known.
	Probe func(r io.ReaderAt, size int64) (string, error)
	// Version of Varve, for the record.
	Version string

	pulse *pulse // of work that is watched
}

// Pod is the environment of a mover's pod.
func Pod(probe func(io.ReaderAt, int64) (string, error), version string) Environment {
	return Environment{
		Device: mover.DevicePath, StoreDir: mover.StoreDir, Scratch: mover.ScratchDir, ConfigDir: mover.ConfigDir, VolumeDir: mover.VolumeDir,
		Log: os.Stdout, Probe: probe, Version: version,
	}
}

// action does a Task with an open repository.
type action func(ctx context.Context, e Environment, t mover.Task, repo *store.Open) (mover.Result, error)

var actions = map[mover.Action]action{
	mover.ActionBackup:   makePoint,
	mover.ActionRestore:  restore,
	mover.ActionMaintain: maintain,
}

// Run does a Task. It always returns a Result, with the reason if it failed. When ctx ends
// before (SIGTERM), what was done is kept as far as it can be, for the next attempt.
func Run(ctx context.Context, e Environment, t mover.Task) mover.Result {
	var r mover.Result
	var err error
	if t.Action == mover.ActionRestore { // whose user waits, and is to be told
		r, err = watch(ctx, prober(e, t), func(ctx context.Context, p *pulse) (mover.Result, error) {
			e := e
			e.pulse = p

			return run(ctx, e, t)
		})
	} else {
		r, err = run(ctx, e, t)
	}
	if err != nil {
		slog.ErrorContext(ctx, "failed", "action", string(t.Action), "error", err)
		restored := r.Restore // how large the device is, for one that is short
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
	repo, err := t.Store.Open(ctx, store.OpenOptions{Credentials: c, Dir: e.Scratch, ConfigDir: e.ConfigDir, VolumeDir: e.VolumeDir, MetadataBytes: 512 << 20})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	if r, err = do(ctx, e, t, repo); err == nil {
		r.OK = true
	}
	if r.KeepError != "" {
		r.KeepError = repo.Redact(errors.New(r.KeepError)).Error()
		slog.ErrorContext(ctx, "retention could not be applied", "error", r.KeepError)
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
		r.Message = "the mover was told to end: " + err.Error()
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
func openDevice(path string) (*disk.Source, error) {
	src, err := disk.Open(path, disk.Options{})
	switch {
	case err == nil:
		return src, nil
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

// Tell writes p if it is time for it or begins another phase.
func (r *reporter) Tell(p mover.Progress) {
	if r.w == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); p.Phase != r.was || now.Sub(r.last) >= progressEvery || p.Total > 0 && p.Done == p.Total {
		r.last, r.was = now, p.Phase
		// A log that nobody takes is no reason to fail.
		_, _ = fmt.Fprintln(r.w, p.Line())
	}
}

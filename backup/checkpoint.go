package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// parentFile is how an incomplete manifest holds on to the parent's disk.
const parentFile = "parent.img"

// Tags of an incomplete manifest: which process wrote it, so that what a
// killed one left can be told from what a running one holds.
const (
	tagRunHost  = "varve-run-host"
	tagRunPID   = "varve-run-pid"
	tagRunBoot  = "varve-run-boot"
	tagRunStart = "varve-run-start"
)

// staleIncomplete is how long an incomplete manifest of another host or boot may
// go without being renewed before it is taken for that of a dead run. Runs renew
// theirs each minute; hours of clock skew must not matter.
const staleIncomplete = 24 * time.Hour

const incompleteReason = "backup in progress"

// protect writes an incomplete manifest over the parent before anything is
// read: from here on a collection sees what this run builds on, even if the
// parent is deleted.
func (r *run) protect(ctx context.Context) error {
	if r.base == nil {
		return nil // nothing to hold on to until the first checkpoint
	}
	return r.writeIncomplete(ctx, nil)
}

// checkpoint makes everything stored so far findable and protected. A run
// killed later uploads only what came after it again. No worker is active.
func (r *run) checkpoint(ctx context.Context) error {
	if err := r.settleTail(ctx); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	root, err := r.build.Root(ctx)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if err := r.writeIncomplete(ctx, &root); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	r.lastCheckpoint = time.Now()
	r.counters.sinceCheckpoint.Store(0)
	r.counters.checkpoints++
	r.opt.step("checkpoint")
	return nil
}

// settleTail sets the one segment that a change of the disk's size cut or
// extended, if the run has not come to it yet: a root cannot list the parent's,
// which has another length. The run sets it again when it gets there.
func (r *run) settleTail(ctx context.Context) error {
	if r.base == nil {
		return nil
	}
	n := min(segmentsOf(r.base), r.lay.Segments()) - 1
	if n < 0 || segmentLen(r.base, n) == r.lay.SegmentLen(n) || r.build.Written(n) {
		return nil
	}
	entries, err := r.build.Base(ctx, n)
	if err != nil {
		return err
	}
	return r.build.SetSegment(ctx, n, entries)
}

func (r *run) writeIncomplete(ctx context.Context, partial *blocktree.Root) error {
	var files []repository.File
	// The time makes the directory a content that was never there before. One
	// that was might be in the middle of being collected, and the manifest would
	// protect nothing.
	now := r.repo.Now()
	if partial != nil {
		files = append(files, repository.File{
			Name: blocktree.DiskFile, Size: partial.Size, ModTime: now, Mode: 0o600, Object: partial.Object,
		})
	}
	if r.base != nil {
		files = append(files, repository.File{
			Name: parentFile, Size: r.base.Size(), ModTime: now, Mode: 0o600, Object: r.base.Root().Object,
		})
	}
	host, _ := os.Hostname()
	s := &repository.Snapshot{
		Source: r.opt.Volume.source(), Start: r.rec.Start, End: now,
		Description: "Varve backup under way", Incomplete: incompleteReason,
		// Stock Kopia's "snapshot expire" removes incomplete snapshots that are older
		// than a complete one, whatever the policy says, but none that is pinned.
		Pins: []string{"varve-backup"},
		Tags: map[string]string{tagRunHost: host, tagRunPID: strconv.Itoa(os.Getpid()), tagRunBoot: bootID(), tagRunStart: processStart(os.Getpid())},
	}
	if err := r.w.SaveSnapshot(ctx, s, files); err != nil {
		return err
	}
	if r.incomplete != "" {
		if err := r.w.DeleteSnapshot(ctx, r.incomplete); err != nil {
			return err
		}
	}
	if err := r.w.Flush(ctx); err != nil {
		return err
	}
	r.incomplete, r.protected = s.ManifestID, now
	return nil
}

// stillHeld reports whether what protects this run is there. The repository was refreshed
// before.
func (r *run) stillHeld(ctx context.Context) (bool, error) {
	_, err := r.repo.LoadSnapshot(ctx, r.incomplete)
	if errors.Is(err, repository.ErrSnapshotNotFound) {
		return false, nil
	}
	return err == nil, err
}

// salvage keeps what an interrupted run has stored, so that the next one need
// not upload it again. It is best effort: the cause is what the user sees.
func (r *run) salvage(ctx context.Context, cause error) {
	if r.counters.sinceCheckpoint.Load() == 0 || errors.Is(cause, repository.ErrStorageFull) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := r.checkpoint(ctx); err != nil {
		slog.WarnContext(ctx, "could not keep what was stored before the backup stopped", "cause", cause, "error", err)
	}
}

// dropStale deletes the incomplete manifests that killed runs of this volume
// left, in the flush that completes this one.
func (r *run) dropStale(ctx context.Context) error {
	v := r.opt.Volume
	cat, err := List(ctx, r.repo, ListOptions{Volume: &v})
	if err != nil {
		return err
	}
	for _, p := range cat.Incomplete() {
		if p.ManifestID == r.incomplete {
			continue
		}
		dead, err := deadRun(ctx, r.repo, p)
		if err != nil {
			return err
		}
		if dead {
			if err := r.w.DeleteSnapshot(ctx, p.ManifestID); err != nil {
				return err
			}
		}
	}
	return nil
}

// deadRun reports whether the run that wrote an incomplete manifest is over: a
// process of this host and boot that is gone, or one not heard of for a day.
func deadRun(ctx context.Context, repo *repository.Repository, p *Point) (bool, error) {
	s, err := repo.LoadSnapshot(ctx, p.ManifestID)
	if errors.Is(err, repository.ErrSnapshotNotFound) {
		return false, nil // gone already
	}
	if err != nil {
		return false, err
	}
	if repo.Now().Sub(s.End) > staleIncomplete {
		return true, nil
	}
	// Of another boot only time tells: it may be a container of this host, or another
	// machine of the same name, and its run may be about to finish.
	if host, _ := os.Hostname(); s.Tags[tagRunHost] != host || bootID() == "" || s.Tags[tagRunBoot] != bootID() {
		return false, nil
	}
	pid, err := strconv.Atoi(s.Tags[tagRunPID])
	if err != nil || pid <= 0 {
		return false, nil //nolint:nilerr // not written by us: left alone until it is stale
	}
	return !processAlive(pid, s.Tags[tagRunStart]), nil
}

package backup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/process"
)

// parentFile is the file by which an incomplete manifest keeps the parent's disk reachable.
const parentFile = "parent.img"

// Tags of an incomplete manifest: the process that wrote it, to distinguish the leftovers of
// a killed run from the protection of a live one.
const (
	tagRunHost  = "varve-run-host"
	tagRunBoot  = "varve-run-boot"
	tagRunStart = "varve-run-start"
)

// staleIncomplete is the age at which an incomplete manifest of another host or boot counts
// as left by a dead run. Runs renew theirs each minute; hours of clock skew must not matter.
const staleIncomplete = 24 * time.Hour

const incompleteReason = "backup in progress"

// protect writes an incomplete manifest over the parent before anything is stored: from then on
// a collection keeps what this run builds on, even if the parent is deleted. A short run skips
// it; see protectAndList.
func (r *run) protect(ctx context.Context) error {
	if r.base == nil {
		return nil // nothing to protect until the first checkpoint
	}
	return r.writeIncomplete(ctx, nil)
}

// checkpoint makes everything stored so far findable and protected: a run that is killed
// later uploads again only what came after. No worker is active.
func (r *run) checkpoint(ctx context.Context) error {
	began := time.Now()
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
	now := time.Now()
	r.lastCheckpoint = checkpointed{at: now, took: now.Sub(began), uploaded: r.w.Uploaded()}
	r.counters.sinceCheckpoint.Store(0)
	r.counters.checkpoints++
	r.opt.step("checkpoint")
	return nil
}

// checkpointed describes the last checkpoint of a run.
type checkpointed struct {
	at       time.Time
	took     time.Duration
	uploaded int64 // bytes uploaded by the run before it
}

// due reports whether the next checkpoint is due: after a time, after a number of contents,
// or after a number of bytes unless that would cost too much time.
func (c checkpointed) due(since, every time.Duration, contents, uploaded int64) bool {
	switch {
	case since >= every, contents >= checkpointContents:
		return true
	case uploaded-c.uploaded >= checkpointBytes:
		return since >= max(checkpointApart, checkpointShare*c.took)
	}
	return false
}

// settleTail sets the one segment that a change of the disk's size cut or extended, unless
// the run has already written it: a root cannot list the parent's segment, which has another
// length. The run sets it again when it gets there.
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
	// The time makes the directory a new content. An existing one might be in the middle of
	// being collected, and the manifest would protect nothing.
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
		Source: r.opt.Volume.Source(), Start: r.rec.Start, End: now,
		Description: "Varve backup under way", Incomplete: incompleteReason,
		// Stock Kopia's "snapshot expire" removes incomplete snapshots older than a complete
		// one under any policy, but no pinned ones.
		Pins: []string{"varve-backup"},
		Tags: map[string]string{tagRunHost: host, points.TagRunPID: strconv.Itoa(os.Getpid()), tagRunBoot: process.BootID(), tagRunStart: process.Start(os.Getpid())},
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

// stillHeld reports whether the manifest that protects this run exists. The caller has
// refreshed the repository.
func (r *run) stillHeld(ctx context.Context) (bool, error) {
	_, err := r.repo.LoadSnapshot(ctx, r.incomplete)
	if errors.Is(err, repository.ErrSnapshotNotFound) {
		return false, nil
	}
	return err == nil, err
}

// salvage keeps what an interrupted run has stored, so that the next run does not upload it
// again. It is best effort: the user sees the cause.
func (r *run) salvage(ctx context.Context, cause error) {
	if r.counters.sinceCheckpoint.Load() == 0 || errors.Is(cause, repository.ErrStorageFull) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := r.checkpoint(ctx); err != nil {
		r.repo.Log().WarnContext(ctx, "could not save what was stored before the backup stopped", "cause", cause, "error", err)
	}
}

// dropStale deletes the incomplete manifests that killed runs of this volume left, in the
// flush that completes this run.
func (r *run) dropStale(ctx context.Context) error {
	v := r.opt.Volume
	cat, err := points.List(ctx, r.repo, points.ListOptions{Volume: &v})
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

// deadRun reports whether the run that wrote an incomplete manifest has ended: its process on
// this host and boot is gone, or it has not been renewed for a day.
func deadRun(ctx context.Context, repo *repository.Repository, p *points.Point) (bool, error) {
	s, err := repo.LoadSnapshot(ctx, p.ManifestID)
	if errors.Is(err, repository.ErrSnapshotNotFound) {
		return false, nil // already deleted
	}
	if err != nil {
		return false, err
	}
	if repo.Now().Sub(s.End) > staleIncomplete {
		return true, nil
	}
	// For another boot only its age decides: it may be a container of this host or another
	// machine of the same name, and its run may be about to finish.
	if host, _ := os.Hostname(); s.Tags[tagRunHost] != host || process.BootID() == "" || s.Tags[tagRunBoot] != process.BootID() {
		return false, nil
	}
	pid, err := strconv.Atoi(s.Tags[points.TagRunPID])
	if err != nil || pid <= 0 {
		return false, nil //nolint:nilerr // not written by us: kept until it is stale
	}
	return !process.Alive(pid, s.Tags[tagRunStart]), nil
}

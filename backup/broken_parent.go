package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// parentBroken reports whether a run failed because the parent it chose itself is damaged. If
// the caller named the parent, or it was deleted during the run, the caller decides.
func (r *run) parentBroken(err error) bool {
	if r.parent == nil || r.opt.Parent != "" || errors.Is(err, ErrLostData) {
		return false
	}
	return errors.Is(err, repository.ErrContentMissing) || errors.Is(err, repository.ErrContentCorrupt) ||
		errors.Is(err, blocktree.ErrMalformed) || errors.Is(err, points.ErrNoRecord)
}

// fullInstead returns the options of a full backup after a run whose parent is broken: a
// damaged point must not stop the backups of its volume. Blocks that the repository has are
// not uploaded again. The unreadable object is forgotten: while the index has it, the same
// bytes would not be stored again.
func fullInstead(ctx context.Context, repo *repository.Repository, opt Options, broken *run, cause error) (Options, error) {
	repo.Log().WarnContext(ctx, "the recovery point to build on cannot be read; taking a full backup", "parent", broken.parent.Name(), "error", cause,
		"next", "varve verify --quarantine")
	w, err := repo.NewWriter(ctx, "varve broken parent")
	if err != nil {
		return opt, err
	}
	defer w.Close()
	if broken.incomplete != "" {
		if err := w.DeleteSnapshot(ctx, broken.incomplete); err != nil {
			return opt, err
		}
	}
	var object *repository.ObjectError
	if errors.As(cause, &object) {
		st, err := w.StateOf(ctx, object.Object)
		if err == nil && st.Found && !st.Deleted {
			err = w.ForgetContent(ctx, object.Object)
		}
		if err != nil {
			return opt, err
		}
	}
	if err := w.Flush(ctx); err != nil {
		return opt, err
	}
	opt.Full = true
	if opt.BlockSize == 0 {
		opt.BlockSize = broken.parent.BlockSize // so that blocks are recognised
	}
	if opt.Source != nil { // which may know only the difference
		opt.Fallback = append(slices.Clone(opt.Fallback), cbt.Compare{})
	}
	opt.notes = append(slices.Clone(broken.notes), fmt.Sprintf("%s cannot be read, so a full was taken: %v", broken.parent.Name(), cause))
	return opt, nil
}

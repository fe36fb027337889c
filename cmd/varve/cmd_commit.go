package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/progress"
	"github.com/varve-io/varve/internal/serve"
)

type commitFlags struct {
	volume, verifyUnchanged string
	quiesced                bool
	disk                    diskFlags
}

func newCommitCommand(a *app) *cobra.Command {
	var f commitFlags
	cmd := &cobra.Command{
		Use:     "commit URI|OVERLAY",
		GroupID: groupBackup,
		Short:   "Save an overlay as a new recovery point",
		Long: `Save what was written to a recovery point as a new recovery point, of the same
volume or another. It is stored as an increment of the point under the overlay:
only what the overlay changed is read.

A running overlay is named by the NBD URI of its export ("varve serve
--writable"). While clients write, parts of it are read at different times, so
the point is marked not crash-consistent unless --quiesced says that nothing is
written. What clients have written is saved whether they flushed it or not.

A kept overlay that no server uses is named by its directory: the one given as
--overlay-dir, followed by the ID of the point.`,
		Example: `  varve commit 'nbd+unix:///shop/db@latest?socket=/run/varve-nbd.sock' --quiesced
  varve commit /var/lib/varve/overlays/d0c811d117cdd7f98f92a22158710ad2 --volume test/db`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withRepository(cmd.Context(), func(repo *repository.Repository) error {
				return a.commit(cmd.Context(), repo, args[0], f)
			})
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.volume, "volume", "", "volume of the new point, namespace/name (default that of the point under the overlay, if it is this cluster's)")
	fl.BoolVar(&f.quiesced, "quiesced", false, "nothing is written to the export during the commit: the point is consistent")
	f.disk.add(fl)
	fl.StringVar(&f.verifyUnchanged, "verify-unchanged", "0.1%", "share of the blocks that the overlay did not change to read and compare")
	return cmd
}

func (a *app) commit(ctx context.Context, repo *repository.Repository, target string, f commitFlags) (err error) {
	opt := backup.Options{ToolVersion: readVersion().Version, NotCrashConsistent: !f.quiesced, Branch: true}
	if opt.VerifyUnchanged, err = parseShare(f.verifyUnchanged); err != nil {
		return usagef("--verify-unchanged: %w", err)
	}
	f.disk.set(&opt)
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return err
	}
	var saved *serve.Written
	if strings.Contains(target, "://") {
		e, err := enterExport(ctx, target, serve.DepthContext)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, e.Close()) }()
		saved, err = serve.WrittenOver(ctx, e, cat)
		if err != nil {
			return err
		}
	} else {
		opt.NotCrashConsistent = false // the lock on an overlay keeps writers out
		cache := image.NewCache(64 << 20)
		defer cache.Close()
		if saved, err = openKeptOverlay(ctx, repo, cache, cat, target, a.log); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, saved.Close()) }()
	}
	opt.Disk, opt.Source, opt.Parent, opt.Volume = saved, saved, saved.Base.ID, saved.Base.Volume
	if f.volume == "" && opt.Volume.Cluster != a.clusterOf(repo) {
		return fmt.Errorf("%w: %s: name the volume of the new point: --volume %s, or --volume %s for a volume of this cluster",
			errOtherCluster, saved.Base.FullName(), opt.Volume.FullName(), opt.Volume)
	}
	if f.volume != "" {
		if opt.Volume, err = points.ParseVolume(f.volume, a.clusterOf(repo)); err != nil {
			return &usageError{err}
		}
	}
	task := a.progress.Start("commit to "+opt.Volume.String(), 0, progress.Bytes)
	opt.Progress = func(p backup.Progress) {
		task.SetPhase(p.Phase)
		task.SetTotal(p.Total)
		task.Set(p.Done)
	}
	opt.CheckpointEvery = time.Minute
	a.begin("")
	p, rec, err := backup.Run(ctx, repo, opt)
	task.Done()
	if err != nil {
		return err
	}
	a.made(p)
	if a.flags.output == "table" {
		if _, err := fmt.Fprintf(a.stdout, "saved what was written over %s as a new recovery point:\n", saved.Base.Name()); err != nil {
			return err
		}
	}
	return a.print(backupResultOf(p, rec, "overlay"), func(t *table) { writeBackup(t, p, rec, "overlay") })
}

// errOtherCluster means that a new point would belong to another cluster's volume, which was
// not named.
var errOtherCluster = errors.New("the point under the overlay is another cluster's")

// openKeptOverlay opens the overlay in a directory that is named by its point.
func openKeptOverlay(ctx context.Context, repo *repository.Repository, cache *image.Cache, cat *points.Catalog, dir string, log *slog.Logger) (*serve.Written, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(dir, "map")); err != nil {
		return nil, fmt.Errorf("%s is neither an NBD URI nor the directory of an overlay: %w", dir, err)
	}
	p := cat.ByID(filepath.Base(dir))
	if p == nil {
		return nil, fmt.Errorf("%w: the directory of an overlay is named by the ID of the point under it, and this repository has no point %q",
			points.ErrNoSuchPoint, filepath.Base(dir))
	}
	return serve.KeptOverlay(ctx, repo, cache, p, dir, log)
}

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/progress"
)

type restoreFlags struct {
	force, verify, delta, restart, overwrite bool
	base, changed, spotCheck                 string
	workers                                  int
}

func newRestoreCommand(a *app) *cobra.Command {
	var f restoreFlags
	cmd := &cobra.Command{
		Use:     "restore POINT TARGET",
		GroupID: groupBackup,
		Short:   "Write a recovery point to a device, an image file, or standard output",
		Long: `Write a recovery point to a device, an image file, or standard output ('-').

A file is made sparse; a device must be at least as large as the disk, and
neither may be in use unless --force is given. --overwrite is needed for a file
that exists, and for a device that holds anything known (a file system, a
partition table, LVM, LUKS, swap, a member of a RAID, ...): the message names it.
What a device has behind the end of the disk is left as it is, and the result
says how to use it. A restore that was interrupted goes on where it stopped when it is run
again; a sample of what is there already (--verify-unchanged) is read first, and
all of it is compared if the target was used in between.

--delta keeps what the target has and writes only what differs. The target must
hold the same disk (by the UUID of its file system or the ID of its partition
table), or nothing known, unless --overwrite is given. With --base,
the target is known to hold another recovery point (a disk to be rolled back,
say), and only the difference between the two points is written; --changed
names a list of what was written to the target since (docs/cbt-extents.md).
Before anything is written a sample of the rest is read from the target and
compared. Without --base all of the target is read and compared.

--verify reads the target back and compares it with the recovery point.`,
		Example: `  varve restore shop/db@latest /dev/vdc
  varve restore shop/db@2026-11-20T10:00 disk.img --verify
  varve restore shop/db@latest~3 /dev/vdb --delta --base shop/db@latest
  varve restore shop/db@latest - | qemu-img convert -f raw -O qcow2 /dev/stdin db.qcow2`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error { return a.restore(cmd.Context(), args[0], args[1], f) },
	}
	fl := cmd.Flags()
	fl.BoolVar(&f.force, "force", false, "overwrite a target that is mounted or in use otherwise")
	fl.BoolVar(&f.overwrite, "overwrite", false, "write over a file that exists, or what a device holds")
	fl.BoolVar(&f.verify, "verify", false, "read the target back and compare")
	fl.BoolVar(&f.delta, "delta", false, "write only what differs from what the target holds")
	fl.StringVar(&f.base, "base", "", "recovery point that the target is known to hold (with --delta)")
	fl.StringVar(&f.changed, "changed", "", "file with the extents that changed on the target since it held the base, '-' for standard input")
	fl.StringVar(&f.spotCheck, "verify-unchanged", "0.1%", "share of what --base, or an interrupted restore, takes for written that is read and compared first")
	fl.BoolVar(&f.restart, "restart", false, "start from the beginning, whatever an interrupted restore left")
	fl.IntVar(&f.workers, "workers", 0, "blocks decoded and written at once (default one for each CPU)")
	return cmd
}

// restoreResult is what "varve restore -o json" prints.
type restoreResult struct {
	Name    string `json:"name"`
	ID      string `json:"id"`
	Cluster string `json:"cluster"`
	Target  string `json:"target"`
	backup.RestoreResult
	// Tail is what to know of a device that is larger than the disk.
	Tail []string `json:"tail,omitempty"`
}

func (f restoreFlags) check(target string) error {
	switch {
	case f.base != "" && !f.delta:
		return usagef("--base is for --delta: a full restore needs none")
	case f.changed != "" && f.base == "":
		return usagef("--changed needs --base: without it all of the target is compared")
	case target == "-" && (f.delta || f.verify):
		return usagef("standard output cannot be read back: no --delta and no --verify with '-'")
	}
	return nil
}

func (a *app) restore(ctx context.Context, name, path string, f restoreFlags) (err error) {
	if err := f.check(path); err != nil {
		return err
	}
	opt := backup.RestoreOptions{Verify: f.verify, Delta: f.delta, Restart: f.restart, Workers: f.workers}
	if opt.SpotCheck, err = parseShare(f.spotCheck); err != nil {
		return usagef("--verify-unchanged: %w", err)
	}
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	points, err := backup.List(ctx, repo, backup.ListOptions{Foreign: true})
	if err != nil {
		return err
	}
	names := a.names(repo, points)
	p, err := names.Read(name)
	if err != nil {
		return err
	}
	if f.base != "" {
		if opt.Base, err = names.Read(f.base); err != nil {
			return err
		}
	}
	if p.Unread > 0 {
		a.log.Warn("some of this point could not be read when it was backed up and is zeroes", "point", p.Name(), "bytes", p.Unread, "ranges", "varve show "+p.Name())
	}
	if p.NotCrashConsistent {
		a.log.Warn("the disk was written to while this point was made: check what is on it", "point", p.Name())
	}
	task := a.progress.Start("restore "+p.Name(), p.Size, progress.Bytes)
	defer task.Done()
	opt.Progress = func(p backup.Progress) {
		task.SetPhase(p.Phase)
		task.SetTotal(p.Total)
		task.Set(p.Done)
	}
	if path == "-" {
		if isClosed(a.stdout) {
			return errors.New("standard output is closed: nothing was written; send it somewhere")
		}
		_, err := backup.RestoreTo(ctx, repo, p, a.stdout, opt)
		return err
	}
	res, err := a.restoreToDisk(ctx, repo, p, path, f, opt)
	task.Done()
	if err != nil {
		return err
	}
	return a.printRestore(p, a.clusterOf(repo), path, res)
}

func (a *app) restoreToDisk(ctx context.Context, repo *repository.Repository, p *backup.Point, path string, f restoreFlags, opt backup.RestoreOptions) (res restoreResult, err error) {
	if opt.Journal, err = a.restoreJournal(path); err != nil {
		return res, err
	}
	info, err := os.Stat(path)
	isNew := errors.Is(err, fs.ErrNotExist)
	if isNew {
		opt.Restart = true // a journal would be of a file that is gone
		if opt.Delta {
			return res, usagef("--delta changes what a target holds, but %s does not exist", path)
		}
	}
	target, err := disk.OpenTarget(path, disk.TargetOptions{
		Size: p.Size, Force: f.force, Keep: true,
		Buffered: p.BlockSize == 0, // blocks of any length do not suit direct I/O
	})
	if err != nil {
		return res, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, target.RemoveUnused())
		}
		err = errors.Join(err, target.Close())
	}()
	if !isNew && !f.overwrite {
		if err := mayRestore(ctx, repo, p, target, info, opt); err != nil {
			return res, err
		}
	}
	if f.changed != "" {
		if opt.Changed, err = a.changedRanges(ctx, f.changed, opt.Base, target.Size()); err != nil {
			return res, err
		}
	}
	res.RestoreResult, err = backup.Restore(ctx, repo, p, target, opt)
	if err == nil && target.Device() {
		res.Tail = tailAdvice(path, target, target.Size(), p.Size)
	}
	return res, err
}

// errTargetExists means that a restore would replace a file.
var errTargetExists = errors.New("the target exists already")

// restoreJournal is where the restore to a target notes how far it is. The name
// follows the target's path; what it is bound to is the target itself.
func (a *app) restoreJournal(target string) (string, error) {
	full, err := filepath.Abs(target)
	if err != nil {
		return "", fmt.Errorf("restore to %s: %w", target, err)
	}
	dir, ok := a.lookupEnv("XDG_STATE_HOME")
	if !ok || dir == "" {
		home, ok := a.lookupEnv("HOME")
		if !ok || home == "" {
			a.log.Warn("neither XDG_STATE_HOME nor HOME is set: an interrupted restore will start from its beginning")
			return "", nil
		}
		dir = filepath.Join(home, ".local", "state")
	}
	sum := sha256.Sum256([]byte(full))
	return filepath.Join(dir, "varve", "restore-"+hex.EncodeToString(sum[:8])+".journal"), nil
}

func (a *app) changedRanges(ctx context.Context, path string, base *backup.Point, size int64) ([]image.Range, error) {
	list := a.stdin
	if path != "-" {
		file, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("open list of extents: %w", err)
		}
		defer file.Close()
		list = file
	}
	req := cbt.Request{Size: size, Base: &cbt.Base{
		PointID: base.ID, ChangeID: base.ChangeID, VolumeHandle: base.VolumeHandle, Size: base.Size,
	}}
	var out []image.Range
	_, err := cbt.NewExtents(list).Changes(ctx, req, func(e cbt.Extent) error {
		out = append(out, image.Range{Offset: e.Offset, Length: e.Length})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read list of extents %s: %w", path, err)
	}
	return out, nil
}

func (a *app) printRestore(p *backup.Point, cluster, path string, res restoreResult) error {
	res.Name, res.ID, res.Cluster, res.Target = p.Name(), p.ID, p.Volume.Cluster, path
	return a.print(res, func(t *table) {
		t.line("restored %s (ID %s) to %s in %s", p.NameIn(cluster), p.ShortID(), path, res.Duration.Round(time.Millisecond))
		t.line("  %s: wrote %s, zeroed %s", res.Mode, t.bytes(res.Written), t.bytes(res.Zeroed))
		if res.Mode != backup.RestoreFull {
			t.line("  left %s as they were", t.bytes(res.Unchanged))
		}
		if res.Checked > 0 {
			t.line("  spot check: %s of what was there were read, before anything was written", t.bytes(res.Checked))
		}
		if res.Resumed > 0 {
			t.line("  went on with an earlier restore: %s were there", t.bytes(res.Resumed))
		}
		if res.Verified > 0 {
			t.line("  verified: %s read back and are the recovery point", t.bytes(res.Verified))
		}
		for _, line := range res.Tail {
			t.line("  %s", line)
		}
	})
}

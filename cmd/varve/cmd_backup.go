package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/internal/progress"
)

type backupFlags struct {
	volume, parent, extents, handle string
	extentsFormat, extentsBase      string
	extentsTarget                   string
	full, live                      bool
	disk                            diskFlags
	blockSize                       byteSize
	onReadError, onMismatch         string
	verifyUnchanged                 string
	spotCheckLimit                  byteSize
	spotCheckTime                   time.Duration
	workers                         int
	checkpoint                      time.Duration
}

func newBackupCommand(a *app) *cobra.Command {
	var f backupFlags
	cmd := &cobra.Command{
		Use:     "backup SOURCE --volume NAMESPACE/NAME",
		GroupID: groupBackup,
		Short:   "Back up a block device or an image file",
		Long: `Back up a block device or an image file as a new recovery point of a volume.

The first backup of a volume is a full, later ones are increments: they store
the blocks that differ from the latest recovery point. Without --extents the
whole source is read and compared with it; with --extents only what a list of
changed extents names is read (docs/cbt-extents.md), and a sample of the rest
is checked against the parent.

Each recovery point records which disk it was made of: the UUIDs of file systems
and of the partition table, the serial number, the size. Another disk, an empty
one, or one that became smaller is refused. --new-disk begins a new lineage of the
volume with it, which prune counts apart from the points of the disk before;
--allow-shrink accepts a smaller size.

Every recovery point can be read as a whole disk and can be deleted without
touching another. An interrupted backup leaves every older point as it is, and
the next one goes on from the last checkpoint.`,
		Example: `  varve backup /dev/vdb --volume shop/db
  varve backup disk.img --volume shop/db --full
  my-tracker changes | varve backup /dev/vdb --volume shop/db --extents -`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) == 0:
				return usagef("name the disk to back up: a block device or an image file")
			case len(args) > 1:
				return usagef("one disk at a time: got %q and %q", args[0], args[1])
			case args[0] == "-":
				return usagef("standard input is not a disk: name a block device or an image file")
			case f.volume == "":
				return usagef("name the volume that the disk is a state of: --volume NAMESPACE/NAME")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.backup(cmd.Context(), args[0], f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.volume, "volume", "", "volume to back up, namespace/name")
	fl.BoolVar(&f.full, "full", false, "take a full, also where an increment could be taken")
	fl.StringVar(&f.parent, "parent", "", "recovery point to build on (default the latest of the volume)")
	fl.StringVar(&f.extents, "extents", "", "file with the extents that changed since the parent, '-' for standard input")
	fl.StringVar(&f.extentsFormat, "extents-format", "auto", "form of the list: varve, or the JSON of a tool: rbd (diff), nbdinfo (--map), qemu-img (map)")
	fl.StringVar(&f.extentsBase, "extents-base", "", "with a tool's list: change ID that it is relative to (default none: it lists what is allocated)")
	fl.StringVar(&f.extentsTarget, "extents-target", "", "with a tool's list: change ID of the state that it lists")
	fl.Var(&f.blockSize, "block-size", "block size of a full, 64K to 4M (default by the size of the disk)")
	fl.BoolVar(&f.live, "live", false, "read a disk that is mounted read-write; the point is marked not crash-consistent")
	fl.StringVar(&f.onReadError, "on-read-error", "fail", "what to do with bytes that cannot be read: fail, or zero and record them")
	fl.StringVar(&f.onMismatch, "on-mismatch", "fail", "what to do when the extents left out a change: fail, or full (compare the whole disk)")
	fl.StringVar(&f.verifyUnchanged, "verify-unchanged", "0.1%", "share of the blocks reported unchanged to read and compare")
	f.spotCheckLimit = backup.DefaultSpotCheckBytes
	fl.Var(&f.spotCheckLimit, "spot-check-limit", "read at most this much for --verify-unchanged; 0 for no limit")
	fl.DurationVar(&f.spotCheckTime, "spot-check-time", backup.DefaultSpotCheckTime, "read at most this long for --verify-unchanged; 0 for no limit")
	f.disk.add(fl)
	fl.StringVar(&f.handle, "volume-handle", "", "what the storage calls the volume; a parent of another one is refused")
	fl.IntVar(&f.workers, "workers", 0, "blocks processed at once (default by the number of CPUs)")
	fl.DurationVar(&f.checkpoint, "checkpoint-every", time.Minute, "at most this much time between checkpoints")
	return cmd
}

// diskFlags say that the disk may differ from the one that was backed up before.
type diskFlags struct{ isNew, allowShrink bool }

func (f *diskFlags) add(fl *pflag.FlagSet) {
	fl.BoolVar(&f.isNew, "new-disk", false, "this is another disk than before: begin a new lineage of the volume, or go on with the one this disk had")
	fl.BoolVar(&f.allowShrink, "allow-shrink", false, "accept a disk that is smaller than it was")
}

func (f *diskFlags) set(opt *backup.Options) {
	opt.AllowShrink = f.allowShrink
	if f.isNew {
		opt.OtherDisk = backup.NewDisk
	}
}

// backupResult is what "varve backup -o json" prints.
type backupResult struct {
	Name               string               `json:"name"`
	ID                 string               `json:"id"`
	Kind               string               `json:"kind"`
	Parent             string               `json:"parent,omitempty"`
	Generation         int64                `json:"generation"`
	Lineage            string               `json:"lineage,omitempty"`
	Size               int64                `json:"size"`
	BlockSize          int64                `json:"blockSize"`
	Source             string               `json:"source"`
	NotCrashConsistent bool                 `json:"notCrashConsistent,omitempty"`
	ReadErrors         []blocktree.Range    `json:"readErrors,omitempty"`
	Stats              blocktree.Stats      `json:"stats"`
	SpotCheck          *blocktree.SpotCheck `json:"spotCheck,omitempty"`
	Fallbacks          []blocktree.Fallback `json:"fallbacks,omitempty"`
	Notes              []string             `json:"notes,omitempty"`
}

func (a *app) backup(ctx context.Context, path string, f backupFlags) (err error) {
	opt, err := a.backupOptions(f)
	if err != nil {
		return err
	}
	if _, err := backup.ParseVolume(f.volume, "any"); err != nil {
		return &usageError{err}
	}
	src, err := disk.Open(path, disk.Options{Live: f.live, Buffered: isRegular(path)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	opt.Disk, opt.NotCrashConsistent = src, src.InUse() != ""
	if format := src.Container(); format != "" {
		a.log.Warn("the bytes of this file are backed up as they are, not the disk that it holds: "+
			"for that, convert it with 'qemu-img convert -O raw', or connect it with 'qemu-nbd --read-only'", "file", path, "format", format)
	}
	if f.extents != "" {
		list := a.stdin
		if f.extents != "-" {
			file, err := os.Open(f.extents)
			if err != nil {
				return fmt.Errorf("open list of extents: %w", err)
			}
			defer file.Close()
			list = file
		}
		if opt.Source, err = f.extentsSource(list); err != nil {
			return err
		}
	}
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()

	if opt.Volume, err = backup.ParseVolume(f.volume, a.clusterOf(repo)); err != nil {
		return err
	}
	task := a.progress.Start("backup "+opt.Volume.String(), 0, progress.Bytes)
	opt.Progress = func(p backup.Progress) {
		task.SetPhase(p.Phase)
		task.SetTotal(p.Total)
		task.Set(p.Done)
	}
	p, rec, err := backup.Run(ctx, repo, opt)
	task.Done()
	if err != nil {
		return err
	}
	if err := a.printBackup(p, rec); err != nil {
		return err
	}
	backup.MaybeMaintain(ctx, repo)
	return nil
}

// describeSpotCheck says what a spot check read, and what its result is worth.
func describeSpotCheck(t *table, c *blocktree.SpotCheck) string {
	limit := ""
	switch c.Limit {
	case "bytes":
		limit = ", as much as --spot-check-limit allows"
	case "time":
		limit = ", as much as --spot-check-time allows"
	}
	if c.Blocks == c.Candidates {
		return fmt.Sprintf("spot check: all %d blocks (%s) that were not listed as changed are unchanged", c.Blocks, t.bytes(c.Bytes))
	}
	return fmt.Sprintf("spot check: %d of %d blocks that were not listed as changed were read (%s%s) and are unchanged; "+
		"if 1 in 1000 had changed, that would have been noticed with a probability of %.0f %%",
		c.Blocks, c.Candidates, t.bytes(c.Bytes), limit, math.Floor(100*c.Probability))
}

// extentsSource is the list of extents in the form that the flags name or the list has.
func (f backupFlags) extentsSource(list io.Reader) (cbt.Source, error) {
	tool := cbt.ExtentsTool(f.extentsFormat)
	switch f.extentsFormat {
	case "auto":
		tool, list = cbt.DetectExtents(list)
	case "varve":
		tool = ""
	case string(cbt.RBDDiff), string(cbt.NBDInfo), string(cbt.QEMUImg):
	default:
		return nil, usagef("--extents-format is auto, varve, rbd, nbdinfo or qemu-img, not %q", f.extentsFormat)
	}
	if tool == "" {
		if f.extentsBase != "" || f.extentsTarget != "" {
			return nil, usagef("--extents-base and --extents-target are for the list of a tool; this one names its states itself")
		}
		return cbt.NewExtents(list), nil
	}
	if f.extentsTarget == "" {
		return nil, usagef("the list is output of %s, which does not name the states: give --extents-target ID, and --extents-base ID for a list of changes", tool)
	}
	return &cbt.ToolExtents{Tool: tool, Base: f.extentsBase, Target: f.extentsTarget, List: list}, nil
}

// isRegular tells an image file from a device. A file that was written a moment
// ago is still in the page cache, where reading it takes a quarter of the time of
// direct I/O; a device is read directly, so that it leaves the cache to others.
func isRegular(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

func (a *app) backupOptions(f backupFlags) (backup.Options, error) {
	opt := backup.Options{
		Full: f.full, Parent: f.parent, VolumeHandle: f.handle, Workers: f.workers, BlockSize: int64(f.blockSize),
		SpotCheckBytes: cmp.Or(int64(f.spotCheckLimit), -1), SpotCheckTime: cmp.Or(f.spotCheckTime, -1),
		CheckpointEvery: f.checkpoint, ToolVersion: readVersion().Version,
	}
	var err error
	if opt.VerifyUnchanged, err = parseShare(f.verifyUnchanged); err != nil {
		return opt, usagef("--verify-unchanged: %w", err)
	}
	switch f.onReadError {
	case "fail":
	case "zero":
		opt.OnReadError = backup.ZeroOnReadError
	default:
		return opt, usagef("--on-read-error is fail or zero, not %q", f.onReadError)
	}
	switch f.onMismatch {
	case "fail":
	case "full":
		opt.OnMismatch = backup.FullOnMismatch
	default:
		return opt, usagef("--on-mismatch is fail or full, not %q", f.onMismatch)
	}
	if n := opt.BlockSize; n != 0 && (n < blocktree.MinBlockSize || n > blocktree.MaxBlockSize || n&(n-1) != 0) {
		return opt, usagef("--block-size is a power of two from 64K to 4M, not %d", n)
	}
	if f.full && f.parent != "" {
		return opt, usagef("--full takes no --parent")
	}
	if f.disk.isNew && f.extents != "" {
		return opt, usagef("--new-disk reads the whole disk: --extents lists changes of the disk that was backed up before")
	}
	f.disk.set(&opt)
	return opt, nil
}

func (a *app) printBackup(p *backup.Point, rec *blocktree.Record) error {
	res := backupResult{
		Name: p.Name(), ID: p.ID, Kind: rec.Kind, Parent: rec.Parent, Generation: rec.Generation, Lineage: rec.Lineage,
		Size: rec.Size, BlockSize: rec.BlockSize, Source: rec.Source, NotCrashConsistent: rec.NotCrashConsistent,
		ReadErrors: rec.ReadErrors, Stats: rec.Stats, SpotCheck: rec.SpotCheck, Fallbacks: rec.Fallbacks, Notes: rec.Notes,
	}
	return a.print(res, func(t *table) {
		st := rec.Stats
		t.line("%s backup %s (ID %s)", rec.Kind, p.Name(), p.ShortID())
		t.line("  read %s, changed %s, uploaded %s in %s",
			t.bytes(st.Read), t.bytes(st.Changed), t.bytes(st.Uploaded), st.Duration.Round(time.Millisecond))
		if c := rec.SpotCheck; c != nil && c.Blocks > 0 {
			t.line("  %s", describeSpotCheck(t, c))
		}
		for _, f := range rec.Fallbacks {
			t.line("  changed blocks from %s instead of %s: %s", f.To, f.From, f.Reason)
		}
		if rec.NotCrashConsistent {
			t.line("  not crash-consistent: the disk was written to while it was read")
		}
		for _, r := range rec.ReadErrors {
			t.line("  could not be read, stored as zeroes: bytes %d to %d", r.Offset, r.Offset+r.Length)
		}
		for _, n := range rec.Notes {
			t.line("  note: %s", n)
		}
	})
}

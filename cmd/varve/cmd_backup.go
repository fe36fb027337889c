package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/progress"
)

type backupFlags struct {
	volume, parent, extents, handle string
	extentsFormat, extentsBase      string
	extentsTarget                   string
	full, live                      bool
	disk                            diskFlags
	source                          sourceFlags
	machine                         machineFlags
	blockSize                       bytesize.Value
	onReadError, onMismatch         string
	verifyUnchanged                 string
	spotCheckLimit                  bytesize.Value
	spotCheckTime                   time.Duration
	workers                         int
	checkpoint                      time.Duration
	exec                            bool
	size, expect                    bytesize.Value
	stream                          bool // back up standard input, or the output of a command
}

func newBackupCommand(a *app) *cobra.Command {
	var f backupFlags
	cmd := &cobra.Command{
		Use:     "backup SOURCE... --volume NAMESPACE/NAME",
		GroupID: groupBackup,
		Short:   "Back up a block device, an image file, a virtual machine or a stream",
		Long: `Back up a block device or an image file as a new recovery point of a volume.

The first backup of a volume is a full, later ones are increments: they store
the blocks that differ from the latest recovery point. Without --extents the
whole source is read and compared with it; with --extents only what a list of
changed extents names is read (docs/cbt-extents.md), and a sample of the rest
is checked against the parent.

Each recovery point records which disk it was made of: the UUIDs of file systems
and of the partition table, the serial number, the size. Another disk, an empty
one, or a smaller one is refused. --new-disk starts a new lineage of the volume,
which prune counts separately from the earlier disk; --allow-shrink accepts a
smaller size.

A source may also be an NBD export (nbd://, nbds://, nbd+unix://) or a transfer of
oVirt (imageio:///FILE), which docs/vm.md describes.

Several sources are backed up as one group (docs/consistency.md): all are opened
before the first is read, and each becomes a point of its own volume, --volume
followed by '-' and the name of the device or file. NAME=SOURCE gives it another
name. A group is listed, restored, pinned and deleted as one.

All disks of a virtual machine are backed up at one moment, as a group: of a libvirt
domain (libvirt:///DOMAIN, libvirt+ssh://HOST/DOMAIN, libvirt+tls://), or of a QEMU by
its monitor (qemu+qmp:///path/qmp.sock; docs/vm.md). Its changes are tracked from
the first backup on; 'varve source forget' ends that.

Standard input ('-') is stored as a stream: a dump, an archive, of any length, of
which only what changed since the last one is stored (docs/consistency.md). If a
producer dies its output just ends, so let varve run it: with --exec the output of
the command after '--' is kept only if it exits with 0. --expect-bytes refuses
another length. With --size the bytes are a disk of exactly that size instead,
written to a file in $TMPDIR first.

Every recovery point can be read as a whole disk and can be deleted without
affecting another. An interrupted backup changes no older point, and the next
one continues from the last checkpoint.`,
		Example: `  varve backup /dev/vdb --volume shop/db
  varve backup disk.img --volume shop/db --full
  varve backup root=/dev/vdb data=/dev/vdc --volume shop/vm
  varve backup libvirt:///shop --volume shop/vm --freeze
  varve backup qemu+qmp:///run/vm/qmp.sock --volume shop/vm
  varve backup --exec --volume shop/db-dump -- pg_dump --format=plain shop
  my-tracker changes | varve backup /dev/vdb --volume shop/db --extents -`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := f.checkStream(cmd, args); err != nil {
				return err
			}
			switch {
			case len(args) == 0:
				return usagef("name the disk to back up: a block device or an image file")
			case !f.stream && len(args) > 1 && (f.extents != "" || f.parent != "" || f.handle != ""):
				return usagef("--extents, --parent and --volume-handle are about one disk: got %d", len(args))
			case f.volume == "":
				return usagef("name the volume of the disk: --volume NAMESPACE/NAME")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.stream {
				return a.backupStream(cmd.Context(), args, f)
			}
			return a.backup(cmd.Context(), args, f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.volume, "volume", "", "volume to back up, namespace/name")
	fl.BoolVar(&f.full, "full", false, "take a full even if an increment is possible")
	fl.StringVar(&f.parent, "parent", "", "recovery point to build on (default the latest of the volume)")
	fl.StringVar(&f.extents, "extents", "", "file with the extents that changed since the parent, '-' for standard input")
	fl.StringVar(&f.extentsFormat, "extents-format", "auto", "format of the list: auto, varve, the JSON of a tool: rbd (diff), nbdinfo (--map), qemu-img (map), or the XML of thin_delta")
	fl.StringVar(&f.extentsBase, "extents-base", "", "with a tool's list: change ID that it is relative to (default none: it lists what is allocated)")
	fl.StringVar(&f.extentsTarget, "extents-target", "", "with a tool's list: change ID of the state that it lists")
	fl.Var(&f.blockSize, "block-size", "block size of a full, 64K to 4M (default by the size of the disk)")
	fl.BoolVar(&f.live, "live", false, "read a disk that is mounted read-write; the point is marked not crash-consistent")
	fl.StringVar(&f.onReadError, "on-read-error", "fail", "what to do with bytes that cannot be read: fail, or zero and record them")
	fl.StringVar(&f.onMismatch, "on-mismatch", "fail", "what to do when the extents miss a change: fail, or full (compare the whole disk)")
	fl.StringVar(&f.verifyUnchanged, "verify-unchanged", "0.1%", "share of the blocks reported unchanged to read and compare")
	f.spotCheckLimit = backup.DefaultSpotCheckBytes
	fl.Var(&f.spotCheckLimit, "spot-check-limit", "read at most this much for --verify-unchanged; 0 for no limit")
	fl.DurationVar(&f.spotCheckTime, "spot-check-time", backup.DefaultSpotCheckTime, "read at most this long for --verify-unchanged; 0 for no limit")
	f.disk.add(fl)
	f.source.add(fl)
	f.machine.add(fl)
	fl.StringVar(&f.handle, "volume-handle", "", "ID of the volume in the storage; a parent with another one is refused")
	fl.BoolVar(&f.exec, "exec", false, "run the command after '--' and back up its output, if it exits with 0")
	fl.Var(&f.expect, "expect-bytes", "refuse a stream of another length")
	fl.Var(&f.size, "size", "the stream is a disk of exactly this size")
	fl.IntVar(&f.workers, "workers", 0, "blocks processed at once (default by the number of CPUs)")
	fl.DurationVar(&f.checkpoint, "checkpoint-every", time.Minute, "longest time between checkpoints")
	return cmd
}

// diskFlags allow a disk that differs from the one backed up before.
type diskFlags struct{ isNew, allowShrink bool }

func (f *diskFlags) add(fl *pflag.FlagSet) {
	fl.BoolVar(&f.isNew, "new-disk", false, "this is another disk than before: start a new lineage of the volume, or continue the lineage of this disk")
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
	Content            string               `json:"content,omitempty"` // "stream" for a stream
	Parent             string               `json:"parent,omitempty"`
	Generation         int64                `json:"generation"`
	Lineage            string               `json:"lineage,omitempty"`
	Size               int64                `json:"size"`
	BlockSize          int64                `json:"blockSize"`
	Disk               string               `json:"disk"`   // type of the source
	Source             string               `json:"source"` // of changed blocks
	NotCrashConsistent bool                 `json:"notCrashConsistent,omitempty"`
	ReadErrors         []blocktree.Range    `json:"readErrors,omitempty"`
	Stats              blocktree.Stats      `json:"stats"`
	SpotCheck          *blocktree.SpotCheck `json:"spotCheck,omitempty"`
	Fallbacks          []blocktree.Fallback `json:"fallbacks,omitempty"`
	Notes              []string             `json:"notes,omitempty"`
}

func (a *app) backup(ctx context.Context, sources []string, f backupFlags) (err error) {
	opt, err := a.backupOptions(f)
	if err != nil {
		return err
	}
	if _, err := points.ParseVolume(f.volume, "any"); err != nil {
		return &usageError{err}
	}
	for _, arg := range sources {
		if _, uri := splitSource(arg); source.Check(uri) != nil {
			return &usageError{source.Check(uri)}
		}
	}
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	if opt.Volume, err = points.ParseVolume(f.volume, a.clusterOf(repo)); err != nil {
		return err
	}
	baseOf, err := bases(ctx, repo)
	if err != nil {
		return err
	}
	open, err := a.openSources(ctx, sources, func(name string) source.Options {
		of := opt.Volume // what is left on the source is of the volume that the disk becomes
		if name != "" {
			of.Name += "-" + name
		}
		o := a.sourceOptions(f.source, repo, of)
		o.Live = f.live
		f.machine.set(&o)
		return o
	}, func(disk string) string { return baseOf(memberVolume(opt.Volume, disk)) })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, open.close()) }()
	if f.extents != "" {
		changes, end, err := a.extents(f)
		if err != nil {
			return err
		}
		defer end()
		if open.isGroup() {
			return usagef("--extents is about one disk, and %s is a machine", sources[0])
		}
		open.disks[0].Changes = []cbt.Source{changes}
	}
	if open.isGroup() {
		if f.parent != "" || f.handle != "" {
			return usagef("--parent and --volume-handle are about one disk, and %s is a machine", sources[0])
		}
		return a.backupGroup(ctx, repo, open, opt)
	}
	open.disks[0].set(&opt)
	end := a.backupProgress(&opt)
	a.begin("")
	p, rec, err := backup.Run(ctx, repo, opt)
	end()
	if err != nil {
		return err
	}
	a.made(p)
	if err := errors.Join(open.commit(ctx), a.print(backupResultOf(p, rec, open.disks[0].Kind), func(t *table) { writeBackup(t, p, rec, open.disks[0].Kind) })); err != nil {
		return err
	}
	backup.MaybeMaintain(ctx, repo)
	return nil
}

// made notes that a recovery point was made.
func (a *app) made(p *points.Point) { a.done("recovery point " + p.Name() + " was made") }

// backupProgress shows the progress of a backup, from its begin until end is called.
func (a *app) backupProgress(opt *backup.Options) (end func()) {
	name := "backup " + opt.Volume.String()
	start := sync.OnceValue(func() *progress.Task { return a.progress.Start(name, 0, progress.Bytes) })
	var begun atomic.Bool
	opt.Progress = func(p backup.Progress) {
		task := start()
		begun.Store(true)
		task.SetPhase(p.Phase)
		task.SetTotal(p.Total)
		task.Set(p.Done)
	}
	return func() {
		if begun.Load() {
			start().Done()
		}
	}
}

// extents opens the list of --extents.
func (a *app) extents(f backupFlags) (changes cbt.Source, end func(), err error) {
	x, end := source.Extents{List: a.stdin, Format: f.extentsFormat, Base: f.extentsBase, Target: f.extentsTarget}, func() {}
	if f.extents != "-" {
		file, err := os.Open(f.extents)
		if err != nil {
			return nil, nil, fmt.Errorf("open list of extents: %w", err)
		}
		x.List, end = file, func() { file.Close() }
	}
	if changes, err = x.Source(); err != nil {
		end()
		return nil, nil, &usageError{err}
	}
	return changes, end, nil
}

// describeSpotCheck describes what a spot check read, and what its result proves.
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

// backupResultOf describes a point; disk is the type of its source.
func backupResultOf(p *points.Point, rec *blocktree.Record, disk string) backupResult {
	return backupResult{
		Name: p.Name(), ID: p.ID, Kind: rec.Kind, Content: rec.Content, Parent: rec.Parent, Generation: rec.Generation, Lineage: rec.Lineage,
		Size: rec.Size, BlockSize: rec.BlockSize, Disk: disk, Source: rec.Source, NotCrashConsistent: rec.NotCrashConsistent,
		ReadErrors: rec.ReadErrors, Stats: rec.Stats, SpotCheck: rec.SpotCheck, Fallbacks: rec.Fallbacks, Notes: rec.Notes,
	}
}

func writeBackup(t *table, p *points.Point, rec *blocktree.Record, disk string) {
	st := rec.Stats
	if rec.IsStream() {
		t.line("stream %s (ID %s)", p.Name(), p.ShortID())
		t.line("  %s, uploaded %s in %s", bytesize.Exact(rec.Size), t.bytes(st.Uploaded), st.Duration.Round(time.Millisecond))
		return
	}
	t.line("%s backup %s (ID %s)", rec.Kind, p.Name(), p.ShortID())
	t.line("  %s, changes by %s", disk, rec.Source)
	t.line("  read %s, changed %s, uploaded %s in %s",
		t.bytes(st.Read), t.bytes(st.Changed), t.bytes(st.Uploaded), st.Duration.Round(time.Millisecond))
	if c := rec.SpotCheck; c != nil && c.Blocks > 0 {
		t.line("  %s", describeSpotCheck(t, c))
	}
	for _, f := range rec.Fallbacks {
		why := f.Reason
		if f.Detail != "" {
			why += ": " + f.Detail
		}
		t.line("  changed blocks from %s instead of %s: %s", f.To, f.From, why)
	}
	if rec.NotCrashConsistent {
		t.line("  not crash-consistent: the disk was written to while it was read")
	}
	for _, r := range rec.ReadErrors {
		t.line("  could not be read, stored as zeroes: bytes %d to %d", r.Offset, r.End())
	}
	for _, n := range rec.Notes {
		t.line("  note: %s", n)
	}
}

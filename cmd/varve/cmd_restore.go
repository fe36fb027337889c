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
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/internal/progress"
)

type restoreFlags struct {
	force, verify, delta, restart, overwrite bool
	group, incomplete                        bool
	followChain                              bool
	vm                                       vmFlags
	base, changed, spotCheck, format         string
	workers                                  int
}

func newRestoreCommand(a *app) *cobra.Command {
	var f restoreFlags
	cmd := &cobra.Command{
		Use:     "restore POINT TARGET...",
		GroupID: groupBackup,
		Short:   "Write a recovery point to a device, an image file, an NBD export, a disk in oVirt, or standard output",
		Long: `Write a recovery point to a device, an image file, or standard output ('-').

A file is made sparse; a device must be at least as large as the disk, and
neither may be in use unless --force is given. --overwrite is needed for a file
that exists, and for a device that holds anything known (a file system, a
partition table, LVM, LUKS, swap, a member of a RAID, ...): the message names it.
What a device has beyond the end of the disk is not changed, and the result says
how to use it. An interrupted restore continues when it is run again: a sample of
what was written (--verify-unchanged) is read first, and all of it is compared if
the target was used in between.

--delta keeps what the target has and writes only what differs. The target must
hold the same disk (by the UUID of its file system or the ID of its partition
table), or nothing known, unless --overwrite is given. With --base,
the target is known to hold another recovery point (a disk to be rolled back,
say), and only the difference between the two points is written; --changed
names a list of what was written to the target since (docs/cbt-extents.md).
Before anything is written a sample of the rest is read from the target and
compared. Without --base all of the target is read and compared.

--format makes an image file of another format, such as qcow2; it has its name
only once it is complete. With --delta one that exists is changed. The target may
also be an NBD export (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH, nbds://),
or an upload to oVirt whose URL is in a file (imageio:///FILE?tls-ca=FILE). A restore
to any of these starts from its beginning after an interruption.

--verify reads the target back and compares it with the recovery point.

With --group the name is of a group, and all its points are restored: into a
directory, a file VOLUME.img each, or each to its own target, MEMBER=TARGET. All
targets are opened and checked before the first is written to. A group that lacks a
point is refused unless --incomplete is given. After an interruption --overwrite is
needed for the targets that are finished.

With --vm the group is of a libvirt domain (docs/vm.md): its disks are written to a
directory in the formats they had, beside its NVRAM and domain.xml, the definition
with the new paths. --define defines it in libvirt; without it none is needed. With
--served no disk is written: the machine uses what "varve serve --writable" serves
at that socket, and starts at once.`,
		Example: `  varve restore shop/db@latest /dev/vdc
  varve restore shop/db@2026-11-20T10:00 disk.img --verify
  varve restore shop/db@latest~3 /dev/vdb --delta --base shop/db@latest
  varve restore --group shop/vm@latest root=/dev/vdb data=/dev/vdc
  varve restore --vm shop/vm@latest /var/lib/libvirt/images/shop --define
  varve restore shop/vm@latest vm.qcow2 --format qcow2
  varve restore shop/vm@latest nbd://host/vm --overwrite
  varve restore shop/db@latest - | gzip > db.img.gz`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case f.vm.vm && f.group:
				return usagef("--vm restores a group by itself: leave out --group")
			case f.vm.vm && (f.format != "" || f.delta):
				return usagef("--vm writes new images in the formats that the machine had: no --format and no --delta")
			case !f.vm.vm && (f.vm.define || f.vm.vmName != "" || f.vm.served != ""):
				return usagef("--define, --vm-name and --served are for --vm")
			}
			if f.group || f.vm.vm {
				return a.restoreGroup(cmd.Context(), args[0], args[1:], f)
			}
			switch {
			case len(args) > 2:
				return usagef("one target: got %q and %q; several are for the points of a group (--group)", args[1], args[2])
			case f.incomplete:
				return usagef("--incomplete is for --group")
			}
			return a.restore(cmd.Context(), args[0], args[1], f)
		},
	}
	fl := cmd.Flags()
	addGroupFlag(cmd, &f.group)
	fl.BoolVar(&f.vm.vm, "vm", false, "the name is of the group of a virtual machine: write its disks and definition to a directory")
	fl.BoolVar(&f.vm.define, "define", false, "with --vm: define the machine in libvirt")
	fl.StringVar(&f.vm.connect, "connect", "libvirt:///", "with --define: libvirt to define it in, such as libvirt:///?connect=qemu:///session")
	fl.StringVar(&f.vm.vmName, "vm-name", "", "with --vm: another name for the machine, which then has no UUID and no MAC addresses of the first")
	fl.StringVar(&f.vm.served, "served", "", "with --vm: write no disks; the machine uses those served at this unix socket by 'varve serve --writable'")
	fl.BoolVar(&f.incomplete, "incomplete", false, "with --group: restore what there is of a group that lacks points")
	fl.StringVar(&f.format, "format", "", "format of the target file: qcow2, vmdk, vhdx, vdi, vpc (.vhd) or raw (default raw)")
	fl.BoolVar(&f.followChain, "follow-chain", false, "with --delta: let an image file lead to files in other folders, and to what is no file")
	fl.BoolVar(&f.force, "force", false, "overwrite a target that is mounted or otherwise in use")
	fl.BoolVar(&f.overwrite, "overwrite", false, "overwrite a file that exists, or what a device holds")
	fl.BoolVar(&f.verify, "verify", false, "read the target back and compare")
	fl.BoolVar(&f.delta, "delta", false, "write only what differs from what the target holds")
	fl.StringVar(&f.base, "base", "", "recovery point that the target is known to hold (with --delta)")
	fl.StringVar(&f.changed, "changed", "", "file with the extents that changed on the target since it held the base, '-' for standard input")
	fl.StringVar(&f.spotCheck, "verify-unchanged", "0.1%", "share of what --base, or an interrupted restore, assumes on the target to read and compare first")
	fl.BoolVar(&f.restart, "restart", false, "start from the beginning, and ignore what an interrupted restore left")
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
	// Tail is advice about a device that is larger than the disk.
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
	case target == "-" && f.elsewhere(target):
		return usagef("standard output is written from its beginning to its end, which no format but raw allows")
	case f.changed != "" && f.elsewhere(target):
		return usagef("--changed is for devices and plain files")
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
	pts, err := points.List(ctx, repo, points.ListOptions{Foreign: true})
	if err != nil {
		return err
	}
	names := a.names(repo, pts)
	p, err := names.Read(name)
	if err != nil {
		return err
	}
	if f.base != "" {
		if opt.Base, err = names.Read(f.base); err != nil {
			return err
		}
	}
	a.warnOfRestore(p)
	end := a.restoreProgress(p, &opt)
	defer end()
	if path == "-" {
		if isClosed(a.stdout) {
			return errors.New("standard output is closed, so nothing was written; redirect it")
		}
		a.begin("what was written to standard output is incomplete: discard it")
		res, err := backup.RestoreTo(ctx, repo, p, a.stdout, opt)
		a.restored(res, err)
		return err
	}
	t, err := a.openRestore(ctx, repo, p, path, f, opt)
	if err != nil {
		return err
	}
	a.begin(t.left(f))
	res, err := t.run(ctx, repo)
	end()
	a.restored(res.RestoreResult, err)
	if err != nil {
		return err
	}
	res = describeRestore(p, path, res)
	return a.print(res, func(t *table) { writeRestore(t, p.NameIn(a.clusterOf(repo)), res) })
}

// restored notes how a restore ended.
func (a *app) restored(res backup.RestoreResult, err error) {
	switch {
	case err == nil:
		a.done("all of the disk was written")
	case res.Size == 0, errors.Is(err, backup.ErrVerify): // it did not begin; the error says all
		a.notBegun()
	}
}

// warnOfRestore warns of what is wrong with the disk of a point.
func (a *app) warnOfRestore(p *points.Point) {
	if p.Unread > 0 {
		a.log.Warn("some of this point could not be read when it was backed up and is zeroes", "point", p.Name(), "bytes", p.Unread, "ranges", "varve show "+p.Name())
	}
	if p.NotCrashConsistent {
		a.log.Warn("the disk was written to during this backup: check its file systems", "point", p.Name())
	}
}

// restoreProgress shows the progress of a restore, until end is called.
func (a *app) restoreProgress(p *points.Point, opt *backup.RestoreOptions) (end func()) {
	task := a.progress.Start("restore "+p.Name(), p.Size, progress.Bytes)
	opt.Progress = func(p backup.Progress) {
		task.SetPhase(p.Phase)
		task.SetTotal(p.Total)
		task.Set(p.Done)
	}
	return task.Done
}

// restoreTarget is an open target.
type restoreTarget interface {
	backup.RestoreTarget
	// Finish closes it after a restore, Abort without one.
	Finish() error
	Abort() error
}

// localTarget is a device or a plain file.
type localTarget struct{ *disk.Target }

func (t localTarget) Finish() error { return t.Close() }
func (t localTarget) Abort() error  { return errors.Join(t.RemoveUnused(), t.Close()) }

// openedRestore is a restore with an open target that may be written to.
type openedRestore struct {
	point  *points.Point
	path   string
	target restoreTarget
	whole  bool // the target may be larger than the disk
	image  bool // a new image, which has its name once it is complete
	opt    backup.RestoreOptions
}

// resumes reports whether a second run of the same command continues this one.
func (t *openedRestore) resumes() bool { return t.opt.Journal != "" }

// left is what an error during the restore leaves behind, and what a second run does.
func (t *openedRestore) left(f restoreFlags) string {
	switch {
	case t.image:
		return "no image was made"
	case !t.resumes() && (f.overwrite || f.delta):
		return "the target is incomplete; a second run starts from the beginning"
	case !t.resumes(): // what is there by then may be a disk
		return "the target is incomplete; run it again with --overwrite: it starts from the beginning"
	case f.restart:
		return "the target is incomplete; run the same command again without --restart to continue"
	}
	return "the target is incomplete; run the same command again to continue"
}

// openRestore opens a target and checks that the point may be written to it. It writes
// nothing.
func (a *app) openRestore(ctx context.Context, repo *repository.Repository, p *points.Point, path string, f restoreFlags, opt backup.RestoreOptions) (_ *openedRestore, err error) {
	if f.elsewhere(path) {
		return a.openRestoreElsewhere(ctx, repo, p, path, f, opt)
	}
	if format := source.FormatOf(path); format != "" && f.format == "" {
		return nil, usagef("%s is named as %s: pass --format %s for an image of that format, or --format raw for the bytes of the disk", path, format, format)
	}
	if opt.Journal, err = a.restoreJournal(path); err != nil {
		return nil, err
	}
	if p.Stream {
		if opt.Delta {
			return nil, fmt.Errorf("%w: no --delta", p.NeedDisk())
		}
		opt.Stream = true
	}
	info, err := os.Stat(path)
	isNew := errors.Is(err, fs.ErrNotExist)
	if isNew {
		opt.Restart = true // a journal would be of a deleted file
		if opt.Delta {
			return nil, usagef("--delta changes what a target holds, but %s does not exist", path)
		}
	}
	target, err := disk.OpenTarget(path, disk.TargetOptions{
		Size: p.Size, Force: f.force, Keep: true,
		Buffered: p.BlockSize == 0, // blocks of any length do not allow
	})
	if err != nil {
		return nil, err
	}
	if p.Stream && target.Device() {
		return nil, errors.Join(fmt.Errorf("%s is a device: %w", path, p.NeedDisk()), target.Close())
	}
	t := &openedRestore{point: p, path: path, target: localTarget{target}, whole: target.Device(), opt: opt}
	if !isNew && !f.overwrite {
		err = mayRestore(ctx, repo, p, target, info, opt)
	}
	if err == nil && f.changed != "" {
		t.opt.Changed, err = a.changedRanges(ctx, f.changed, opt.Base, target.Size())
	}
	if err != nil {
		return nil, errors.Join(err, t.abandon())
	}
	return t, nil
}

// abandon closes a target to which nothing was written.
func (t *openedRestore) abandon() error { return t.target.Abort() }

// run writes the point and closes the target.
func (t *openedRestore) run(ctx context.Context, repo *repository.Repository) (res restoreResult, err error) {
	res.RestoreResult, err = backup.Restore(ctx, repo, t.point, t.target, t.opt)
	if err == nil && t.whole {
		res.Tail = tailAdvice(t.path, t.target, t.target.Size(), t.point.Size)
	}
	if err != nil {
		return res, errors.Join(err, t.target.Abort())
	}
	return res, t.target.Finish()
}

// errTargetExists means that a restore would replace a file.
var errTargetExists = errors.New("the target exists already")

// restoreJournal returns the path of the journal of the restore to a target. The path follows
// the target's; the journal itself names the target's identity.
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

func (a *app) changedRanges(ctx context.Context, path string, base *points.Point, size int64) ([]blocktree.Range, error) {
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
	var out []blocktree.Range
	_, err := cbt.NewExtents(list).Changes(ctx, req, func(e cbt.Extent) error {
		out = append(out, blocktree.Range{Offset: e.Offset, Length: e.Length})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read list of extents %s: %w", path, err)
	}
	return out, nil
}

func describeRestore(p *points.Point, path string, res restoreResult) restoreResult {
	res.Name, res.ID, res.Cluster, res.Target = p.Name(), p.ID, p.Volume.Cluster, path
	return res
}

func writeRestore(t *table, name string, res restoreResult) {
	t.line("restored %s (ID %s) to %s in %s", name, shortID(res.ID), res.Target, res.Duration.Round(time.Millisecond))
	t.line("  %s: wrote %s, zeroed %s", res.Mode, t.bytes(res.Written), t.bytes(res.Zeroed))
	if res.Mode != backup.RestoreFull {
		t.line("  unchanged: %s", t.bytes(res.Unchanged))
	}
	if res.Checked > 0 {
		t.line("  spot check: %s of the target were read and compared before the first write", t.bytes(res.Checked))
	}
	if res.Resumed > 0 {
		t.line("  continued an earlier restore: %s were written already", t.bytes(res.Resumed))
	}
	if res.Verified > 0 {
		t.line("  verified: %s were read back and match the recovery point", t.bytes(res.Verified))
	}
	for _, line := range res.Tail {
		t.line("  %s", line)
	}
}

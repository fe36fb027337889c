package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/source"
)

// openedDisk is a disk to back up, in an open session.
type openedDisk struct {
	source.Disk

	name    string // distinct within a group
	session source.Session
}

// set makes a backup read the disk.
func (d *openedDisk) set(opt *backup.Options) {
	opt.Disk, opt.NotCrashConsistent, opt.Check = d.Bytes, d.Live, d.session.Check
	if m := machineOf(d.session); m != nil {
		setMoment(opt, m)
	}
	if len(d.Changes) > 0 {
		opt.Source, opt.Fallback = d.Changes[0], d.Changes[1:]
	}
}

// openedSources are the sources of one backup.
type openedSources struct {
	sessions []source.Session
	disks    []openedDisk
}

// openSources opens all sources of a command line, none or all. options are those of the
// source of a name, by which it differs from the others; empty where it is the only one. base
// gives what the next increment of a machine's disk builds on, by what ends the name of its
// volume; nil where there is no machine.
func (a *app) openSources(ctx context.Context, args []string, options func(name string) source.Options, base func(disk string) string) (_ *openedSources, err error) {
	open := &openedSources{}
	defer func() {
		if err != nil {
			err = errors.Join(err, open.close())
		}
	}()
	for _, arg := range args {
		name, uri := splitSource(arg)
		member := ""
		if len(args) > 1 {
			member = cmp.Or(name, baseName(uri))
		}
		opt := options(member)
		if base != nil {
			opt.Base = func(disk string) string { return base(diskName(name, disk)) }
		}
		session, err := source.Open(ctx, uri, opt)
		if errors.Is(err, source.ErrScheme) || errors.Is(err, source.ErrURI) {
			return open, &usageError{err}
		}
		if err != nil {
			return open, err
		}
		open.sessions = append(open.sessions, session)
		of := session.Disks()
		for _, d := range of {
			for _, n := range d.Notes {
				a.log.Warn(n, "source", uri)
			}
			o := openedDisk{Disk: d, session: session}
			o.name = cmp.Or(diskName(name, d.Name), baseName(uri))
			open.disks = append(open.disks, o)
		}
	}
	if len(open.disks) == 0 {
		return open, fmt.Errorf("%s has no disk", args[0])
	}
	return open, open.checkNames()
}

// splitSource splits NAME=SOURCE; a file may itself have such a name.
func splitSource(arg string) (name, uri string) {
	before, after, ok := strings.Cut(arg, "=")
	if !ok || strings.Contains(before, "/") {
		return "", arg
	}
	if _, err := os.Lstat(arg); err == nil {
		return "", arg
	}
	return before, after
}

// baseName returns the last part of a path, without the extension of an image file.
func baseName(path string) string {
	base := filepath.Base(path)
	for _, ext := range []string{".img", ".raw", ".qcow2", ".vmdk", ".vhdx", ".vdi", ".vhd"} {
		base = strings.TrimSuffix(base, ext)
	}
	return base
}

// isGroup reports whether the disks are to be a group: those of a machine always are, as it may
// have more of them later.
func (o *openedSources) isGroup() bool { return len(o.disks) > 1 || o.disks[0].Name != "" }

// checkNames refuses disks of a group that have no distinct names.
func (o *openedSources) checkNames() error {
	if !o.isGroup() {
		return nil
	}
	seen := map[string]bool{}
	for _, d := range o.disks {
		if !blocktree.ValidNamePart(d.name) {
			return usagef("%q cannot end the name of a volume: name the disk, as in data=%s", d.name, d.name)
		}
		if seen[d.name] {
			return usagef("two disks are called %s: name them, as in root=DISK data=DISK", d.name)
		}
		seen[d.name] = true
	}
	return nil
}

// commit ends the sessions after all points are recorded.
func (o *openedSources) commit(ctx context.Context) (err error) {
	for _, s := range o.sessions {
		err = errors.Join(err, s.Commit(ctx))
	}
	return err
}

func (o *openedSources) close() (err error) {
	for _, s := range o.sessions {
		err = errors.Join(err, s.Close())
	}
	return err
}

// groupResult is what "varve backup -o json" prints for several disks.
type groupResult struct {
	Group  *blocktree.Group `json:"group"`
	Points []backupResult   `json:"points"`
}

// backupGroup backs up several disks as a group; opt has what they share, and the name of the
// group as its volume.
func (a *app) backupGroup(ctx context.Context, repo *repository.Repository, open *openedSources, opt backup.Options) error {
	name := opt.Volume
	members, volumes := make([]backup.Options, len(open.disks)), make([]points.Volume, len(open.disks))
	var ends []func()
	for i := range open.disks {
		d, member := &open.disks[i], opt
		member.Volume = memberVolume(name, d.name)
		if err := member.Volume.Check(); err != nil {
			return &usageError{err}
		}
		d.set(&member)
		if member.Consistency != nil { // that of the other disks is another's
			member.Consistency.OneMoment = len(open.sessions) == 1
		}
		ends = append(ends, a.backupProgress(&member))
		volumes[i], members[i] = member.Volume, member
	}
	parts, err := a.partsOf(open, name)
	if err != nil {
		return err
	}
	var streams []backup.StreamOptions
	for _, p := range parts {
		volumes = append(volumes, p.volume)
		streams = append(streams, backup.StreamOptions{
			Volume: p.volume, Reader: bytes.NewReader(p.Content), Expect: int64(len(p.Content)), ToolVersion: opt.ToolVersion,
			CheckpointEvery: opt.CheckpointEvery,
		})
	}
	at := time.Now()
	if t := members[0].Time; !t.IsZero() {
		at = t
	}
	group, err := points.NewGroup(name.String(), volumes, at)
	if err != nil {
		return err
	}
	a.begin("")
	made, err := backup.RunGroup(ctx, repo, group, members, streams...)
	for _, end := range ends {
		end()
	}
	if err != nil {
		if len(made) > 0 {
			a.left = fmt.Sprintf("%d of the %d recovery points of group %s were made; run it again for a whole group", len(made), len(volumes), name)
		}
		return err
	}
	a.done(fmt.Sprintf("the %d recovery points of group %s were made", len(made), name))
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return err
	}
	g := cat.Groups().Of(made[0].Point)
	res := groupResult{Group: group}
	kind := func(i int) string {
		if i < len(open.disks) {
			return open.disks[i].Kind
		}
		return "stream"
	}
	for i, m := range made {
		res.Points = append(res.Points, backupResultOf(m.Point, m.Record, kind(i)))
	}
	err = errors.Join(open.commit(ctx), a.print(res, func(t *table) {
		for i, m := range made {
			writeBackup(t, m.Point, m.Record, kind(i))
		}
		t.line("group %s (ID %s): %d recovery points", g, g.ShortID(), len(made))
	}))
	if err != nil {
		return err
	}
	backup.MaybeMaintain(ctx, repo)
	return nil
}

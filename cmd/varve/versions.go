package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/files"
)

// fileVersion is what "varve ls --versions -o json" prints: a state of a file, which it has
// in the recovery points from First to Last.
type fileVersion struct {
	First  string      `json:"first"`
	Last   string      `json:"last"`
	Points int         `json:"points"`
	File   *files.Info `json:"file,omitempty"`  // nil if the file does not exist or cannot be read
	Error  string      `json:"error,omitempty"` // why the file cannot be read, or compared with the point before
	err    error
}

func (a *app) versions(ctx context.Context, arg string, stale bool) (err error) {
	i := strings.Index(arg, ":/")
	if i < 0 {
		return usagef("--versions wants VOLUME:/PATH, for example shop/db:/etc/fstab")
	}
	name := path.Clean(arg[i+1:])
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return err
	}
	names := a.names(repo, cat)
	v, err := volumeNamed(names, arg[:i])
	if at := strings.IndexByte(arg[:i], '@'); err != nil && at > 0 {
		return usagef("--versions looks through all recovery points of a volume: name it without one, %s%s", arg[:at], arg[i:])
	}
	if err != nil {
		return fmt.Errorf("--versions: %w", err)
	}
	pts := cat.Of(v)
	if len(pts) == 0 {
		return names.NoPoints(v)
	}
	held, end := a.holdPoints(ctx, repo, "ls", disks.Late, versionCacheBytes)
	defer func() { err = errors.Join(err, end()) }()
	found, err := files.History(ctx, held, pts, name, diskfs.Options{Stale: stale}, a.log)
	if errors.Is(err, files.ErrVolumes) {
		return usagef("--versions: %w", err)
	}
	if err != nil {
		return err
	}
	list := make([]fileVersion, len(found))
	for i, v := range found {
		list[i] = fileVersion{First: v.First.Name(), Last: v.Last.Name(), Points: v.Points, File: v.File, err: v.Err}
		if v.Err != nil {
			list[i].Error = message(v.Err)
		}
	}
	if len(list) == 1 && list[0].File == nil && list[0].Error == "" {
		return fmt.Errorf("%s: %w", arg, fs.ErrNotExist) // in no point
	}
	report := &damageReport{app: a, ctx: ctx}
	for _, v := range list {
		if v.err != nil {
			if err := report.fail(v.First, files.Relative(name), v.err); err != nil {
				return err
			}
		}
	}
	return errors.Join(report.err(), a.print(list, func(t *table) {
		t.row("FIRST", "LAST", "POINTS", "MODE", "UID", "GID", "SIZE", "MODIFIED")
		for _, v := range list {
			if v.File == nil && v.Error != "" {
				t.row(v.First, v.Last, v.Points, "(cannot be read)", "", "", "", "")
				continue
			}
			if v.File == nil {
				t.row(v.First, v.Last, v.Points, "(no such file)", "", "", "", "")
				continue
			}
			t.row(v.First, v.Last, v.Points, v.File.Mode, v.File.UID, v.File.GID, v.File.Size, t.time(v.File.ModTime))
		}
	}))
}

// versionCacheBytes bounds the cache for the points that are compared.
const versionCacheBytes = 128 << 20

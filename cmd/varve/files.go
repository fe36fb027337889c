package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/files"
)

// opener opens POINT:/PATTERN and returns the point's files, the file system of the path (nil
// for the list of volumes) and the paths in it that match.
type opener func(ctx context.Context, arg string, stale bool) (*files.Point, diskfs.FileSystem, []string, error)

// withFiles calls fn with an opener, whose files it closes afterwards, and a report of what
// cannot be read, whose error it returns if fn has none. The points have leases, for a
// purpose, by a rule.
func (a *app) withFiles(ctx context.Context, purpose string, rule disks.Rule, fn func(opener, *damageReport) error) (err error) {
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	cacheBytes := int64(fileCacheBytes)
	if rule == disks.Late { // a listing, of whatever size
		cacheBytes = listCacheBytes
		if os.Getenv("GOMEMLIMIT") == "" {
			defer debug.SetMemoryLimit(debug.SetMemoryLimit(listMemory))
		}
	}
	held, end := a.holdPoints(ctx, repo, purpose, rule, cacheBytes)
	defer func() { err = errors.Join(err, end()) }()
	var opened []*files.Point
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	report := &damageReport{app: a, ctx: ctx}
	err = fn(func(ctx context.Context, arg string, stale bool) (*files.Point, diskfs.FileSystem, []string, error) {
		from, name, err := a.openFiles(ctx, repo, held, arg)
		if err != nil {
			return nil, nil, nil, err
		}
		opened = append(opened, from)
		fsys, inside, err := from.Find(name, diskfs.Options{Stale: stale})
		if err != nil || fsys == nil {
			return from, nil, nil, err
		}
		names, err := browse.Glob(ctx, fsys, inside, func(name string, err error) error {
			return report.fail(from.Name(), name, err)
		})
		if err != nil {
			return nil, nil, nil, from.Explain(err)
		}
		return from, fsys, names, nil
	}, report)
	if err == nil {
		err = report.err()
	}
	return err
}

// listOfVolumes is the error of a path that names the list of a disk's volumes.
func listOfVolumes(arg string, from *files.Point) error {
	return fmt.Errorf("%s is a list of volumes: name one of %s", arg, strings.Join(from.VolumeNames(), ", "))
}

// eachFile calls fn for each file that the arguments name; several means that there is more
// than one, and the report is that of withFiles.
func (a *app) eachFile(ctx context.Context, purpose string, rule disks.Rule, args []string, stale bool, fn func(from *files.Point, fsys diskfs.FileSystem, name string, several bool, report *damageReport) error) error {
	return a.withFiles(ctx, purpose, rule, func(open opener, report *damageReport) error {
		for _, arg := range args {
			from, fsys, names, err := open(ctx, arg, stale)
			if err != nil {
				return err
			}
			if fsys == nil {
				return listOfVolumes(arg, from)
			}
			for _, name := range names {
				if err := fn(from, fsys, name, len(args) > 1 || len(names) > 1, report); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

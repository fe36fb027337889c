package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
)

// opener opens what POINT:/PATTERN names: a point's files, the file system that the
// path lies in (nil for the list of volumes) and the paths in it that match.
type opener func(ctx context.Context, arg string, stale bool) (*pointFiles, diskfs.FileSystem, []string, error)

// withFiles calls fn with an opener, whose files are closed afterwards, and a report of what
// cannot be read, which is the error where fn has none. The points have a lease, for a
// purpose, at once or after the wait.
func (a *app) withFiles(ctx context.Context, purpose string, wait time.Duration, fn func(opener, *damageReport) error) (err error) {
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	cacheBytes := int64(fileCacheBytes)
	if wait == holdLate { // a listing, of whatever size
		cacheBytes = listCacheBytes
		if os.Getenv("GOMEMLIMIT") == "" {
			defer debug.SetMemoryLimit(debug.SetMemoryLimit(listMemory))
		}
	}
	leases := newHolder(repo, purpose, wait, a.log)
	defer leases.release(ctx)
	var opened []*pointFiles
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	report := &damageReport{app: a, ctx: ctx}
	err = fn(func(ctx context.Context, arg string, stale bool) (*pointFiles, diskfs.FileSystem, []string, error) {
		files, name, err := a.openFiles(ctx, repo, leases, cacheBytes, arg)
		if err != nil {
			return nil, nil, nil, err
		}
		opened = append(opened, files)
		fsys, inside, err := files.find(name, diskfs.Options{Stale: stale})
		if err != nil || fsys == nil {
			return files, nil, nil, err
		}
		names, err := browse.Glob(ctx, fsys, inside, func(name string, err error) error {
			return report.fail(files.point.Name(), name, err)
		})
		if err != nil {
			return nil, nil, nil, files.at(err)
		}
		return files, fsys, names, nil
	}, report)
	if err == nil {
		err = report.err()
	}
	return err
}

// at names the file that an error is about as users do.
func (f *pointFiles) at(err error) error {
	name := f.point.Name()
	if path, ok := err.(*fs.PathError); ok { //nolint:errorlint // one within another error is part of its text
		return fmt.Errorf("%s:%s: %w", name, rooted(path.Path), path.Err)
	}
	return fmt.Errorf("%s: %w", name, err)
}

// eachFile calls fn for each file that the arguments name; several tells that there is
// more than one, and the report is that of withFiles.
func (a *app) eachFile(ctx context.Context, purpose string, wait time.Duration, args []string, stale bool, fn func(files *pointFiles, fsys diskfs.FileSystem, name string, several bool, report *damageReport) error) error {
	return a.withFiles(ctx, purpose, wait, func(open opener, report *damageReport) error {
		for _, arg := range args {
			files, fsys, names, err := open(ctx, arg, stale)
			if err != nil {
				return err
			}
			if fsys == nil {
				return fmt.Errorf("%s is a list of volumes: name one of %s", arg, strings.Join(files.volumeNames(), ", "))
			}
			for _, name := range names {
				if err := fn(files, fsys, name, len(args) > 1 || len(names) > 1, report); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

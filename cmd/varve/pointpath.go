package main

import (
	"context"
	"errors"
	"path"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs/files"
)

// fileCacheBytes bounds the decoded blocks that a command that reads files keeps: metadata is
// read repeatedly, content once.
const fileCacheBytes = 128 << 20

// listCacheBytes is the bound for commands that only list: they read metadata in disk order,
// so that little is read again.
const listCacheBytes = 16 << 20

// listMemory is the heap that a command that only lists should not exceed: beyond it garbage
// is collected more often.
const listMemory = 64 << 20

// openFiles opens the point that arg names and returns the path after it.
func (a *app) openFiles(ctx context.Context, repo *repository.Repository, held *disks.Disks, arg string) (*files.Point, string, error) {
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return nil, "", err
	}
	p, name, err := files.SplitPath(a.names(repo, cat), arg)
	if errors.Is(err, files.ErrPath) {
		return nil, "", &usageError{err}
	}
	if err != nil {
		return nil, "", err
	}
	f, err := files.Open(ctx, held, p, a.log)
	if err != nil {
		return nil, "", err
	}
	return f, path.Clean("/" + name), nil
}

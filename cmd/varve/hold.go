package main

import (
	"context"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
)

// holdPoints returns the disks of a command, with a cache of cacheBytes. Call end before the
// repository is closed.
func (a *app) holdPoints(ctx context.Context, repo *repository.Repository, purpose string, rule disks.Rule, cacheBytes int64) (held *disks.Disks, end func() error) {
	cache := image.NewCache(cacheBytes)
	held = disks.New(repo, cache, disks.Options{Purpose: purpose, Lease: rule, Log: a.log})
	return held, func() error {
		defer cache.Close()
		return held.Close(context.WithoutCancel(ctx))
	}
}

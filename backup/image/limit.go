package image

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// ErrReadTimeout means that an object did not arrive within the limit of LimitReads.
var ErrReadTimeout = errors.New("the repository's storage did not answer in time")

// LimitReads bounds the time that reading one object may take, for images that are
// opened after it; 0, the default, for no bound. Call it before the cache is used.
//
// Every read has the bound, those in the background, too: others wait for the one that
// reads a block, and one that waits for storage that is gone, on a connection that the
// system does not know to be dead, would keep them waiting when it is back.
func (c *Cache) LimitReads(limit time.Duration) { c.limit = limit }

// limited is a store with a bound for each object.
type limited struct {
	blocktree.Store
	limit time.Duration
}

// ReadObject reads an object, or gives up.
func (s *limited) ReadObject(ctx context.Context, oid repository.ObjectID) ([]byte, error) {
	octx, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	p, err := s.Store.ReadObject(octx, oid)
	if err != nil && octx.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w (%v)", ErrReadTimeout, s.limit)
	}
	return p, err
}

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

// LimitReads bounds the time to read one object, for images opened after it; 0, the default,
// for no bound. Call it before the cache is used.
//
// Every read has the bound, also in the background: other readers wait for the one that reads
// a block, and if that waits for storage on a dead connection, which the system does not
// notice, they would still wait when the storage is back.
func (c *Cache) LimitReads(limit time.Duration) { c.limit = limit }

// limited is a store with a bound for each object.
type limited struct {
	blocktree.Store
	limit time.Duration
}

// ReadObject reads an object within the limit.
func (s *limited) ReadObject(ctx context.Context, oid repository.ObjectID) ([]byte, error) {
	octx, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	p, err := s.Store.ReadObject(octx, oid)
	if err != nil && octx.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w (%v)", ErrReadTimeout, s.limit)
	}
	return p, err
}

// ReadSoon passes on the announcement of reads.
func (s *limited) ReadSoon(ctx context.Context, oids []repository.ObjectID) bool {
	return blocktree.ReadSoon(ctx, s.Store, oids)
}

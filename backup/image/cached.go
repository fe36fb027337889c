package image

import (
	"context"
	"errors"
)

// ErrNotCached means that a byte, or its index, would have to be read from the repository.
var ErrNotCached = errors.New("not in the cache")

// cachedOnly is the context of a look-up that must not wait: Cache.Segment returns
// ErrNotCached instead of loading. A type of its own costs no allocation and no search
// through values.
type cachedOnly struct{ context.Context }

var lookOnly context.Context = cachedOnly{context.Background()}

// Cached is Blocks from memory alone: it never waits for the repository. If something is
// missing it returns ErrNotCached, perhaps after yielding the bytes before it. data is lent
// as by Blocks.
func (m *Image) Cached(off, length int64, yield func(data []byte, n int64)) error {
	if err := m.checkRange(off, length); err != nil {
		return err
	}
	if !m.warmed.Load() { // the list of index chunks is not in the cache, but in the tree
		return ErrNotCached
	}
	err := m.walk(lookOnly, off, off+length, func(p piece) error {
		if p.zero {
			yield(nil, p.end-p.off)
			return nil
		}
		data, ok := m.cache.lookup(p.entry.Object)
		if !ok || int64(len(data)) != p.entry.Length {
			return ErrNotCached
		}
		yield(data[p.off-p.start:p.end-p.start], p.end-p.off)
		return nil
	})
	if err != nil {
		return ErrNotCached
	}
	m.ahead(m.streams.observe(off, length, m.size, m.window()))
	return nil
}

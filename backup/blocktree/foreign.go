package blocktree

import (
	"context"
	"fmt"

	"github.com/varve-io/varve/backup/repository"
)

// maxDepth bounds how deep indexes of a foreign object may nest.
const maxDepth = 8

// foreignTop returns the top index of an object that Varve did not write: a
// flat table (Velero's block mover, a fixed splitter), one of variable lengths
// (stock Kopia's default splitter), one that nests, or a single content.
func (t *Tree) foreignTop(ctx context.Context) (*Segment, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.foreign != nil {
		return t.foreign, nil
	}
	top := &Segment{Entries: []Entry{{Length: t.root.Size, Object: t.root.Object}}, Len: t.root.Size}
	if _, ok := repository.IsIndirect(t.root.Object); ok {
		var err error
		if top, err = t.loadIndex(ctx, t.root.Object); err != nil {
			return nil, err
		}
	}
	// Velero pads the object to whole blocks and keeps the real size in a tag,
	// so the table may be longer than the disk, but never shorter.
	if top.Len < t.root.Size {
		return nil, fmt.Errorf("%w: object %v has %d bytes, not %d", ErrMalformed, t.root.Object, top.Len, t.root.Size)
	}
	t.foreign = top
	return top, nil
}

func (t *Tree) foreignLeaf(ctx context.Context, off int64) (*Segment, int64, error) {
	s, err := t.foreignTop(ctx)
	if err != nil {
		return nil, 0, err
	}
	base := int64(0)
	for range maxDepth {
		e := &s.Entries[s.Find(off-base)]
		if _, ok := repository.IsIndirect(e.Object); !ok {
			return s, base, nil
		}
		inner, err := t.loadIndex(ctx, e.Object)
		if err != nil {
			return nil, 0, err
		}
		if inner.Len != e.Length {
			return nil, 0, fmt.Errorf("%w: index %v covers %d bytes, not %d", ErrMalformed, e.Object, inner.Len, e.Length)
		}
		s, base = inner, base+e.Start
	}
	return nil, 0, fmt.Errorf("%w: indexes of %v nest deeper than %d", ErrMalformed, t.root.Object, maxDepth)
}

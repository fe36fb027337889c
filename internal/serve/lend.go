package serve

import (
	"context"
	"errors"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/nbdserver"
)

// Lend lends what the disk below lends, where nothing was written: a writable disk is read
// like a read-only one. What was written is read from the overlay, where Lend may wait.
func (w *writable) Lend(ctx context.Context, dst []nbdserver.Piece, off int64, n int, wait bool) ([]nbdserver.Piece, error) {
	base, ok := w.base.(nbdserver.Lender)
	if !ok {
		return dst, nbdserver.ErrNotCached
	}
	o := w.over()
	if o == nil || o.Unchanged(off, int64(n)) {
		return base.Lend(ctx, dst, off, n, wait)
	}
	l := lending{ctx: ctx, over: o, base: base, wait: wait, pieces: dst, at: off}
	o.DirtyIn(off, int64(n), l.changed)
	if l.err == nil {
		l.unchanged(off + int64(n))
	}
	if place := (*nbdserver.OffsetError)(nil); l.err != nil && !errors.As(l.err, &place) {
		for _, p := range l.pieces[len(dst):] {
			if p.Owner != nil {
				p.Owner.Release()
			}
		}
		return dst, l.err
	}
	return l.pieces, l.err
}

// lending assembles a reply from changed and unchanged runs.
type lending struct {
	ctx    context.Context // of one call
	over   *overlay.Overlay
	base   nbdserver.Lender
	wait   bool
	pieces []nbdserver.Piece
	at     int64 // offset of the next piece
	err    error
}

// unchanged lends from the disk below up to an offset.
func (l *lending) unchanged(to int64) {
	if to > l.at {
		l.pieces, l.err = l.base.Lend(l.ctx, l.pieces, l.at, int(to-l.at), l.wait)
		l.at = to
	}
}

// changed adds a run that was written or zeroed, after what is before it.
func (l *lending) changed(off, n int64, zero bool) bool {
	if l.unchanged(off); l.err != nil {
		return false
	}
	l.at = off + n
	switch {
	case zero:
		l.pieces = append(l.pieces, nbdserver.Piece{Zeroes: int(n)})
	case !l.wait:
		l.err = nbdserver.ErrNotCached
	default:
		c := newCopy(int(n))
		if _, err := l.over.ReadAt(l.ctx, c.b, off); err != nil {
			c.Release()
			l.err = &nbdserver.OffsetError{Offset: off, Err: err}
			return false
		}
		l.pieces = append(l.pieces, nbdserver.Piece{Data: c.b, Held: cap(c.b), Owner: c})
	}
	return l.err == nil
}

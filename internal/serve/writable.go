package serve

import (
	"context"
	"errors"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/nbdserver"
)

// writable is a disk that can be written once a client stays: only then it gets an overlay,
// since listing many exports must not make one for each.
type writable struct {
	base nbdserver.Export
	over func() *overlay.Overlay // nil until a client stays
}

var (
	_ nbdserver.Writer     = (*writable)(nil)
	_ nbdserver.Lender     = (*writable)(nil)
	_ nbdserver.Prefetcher = (*writable)(nil)
	_ nbdserver.Statuser   = (*writable)(nil)

	_ nbdserver.ContextNamer = (*writable)(nil)
)

var errNoOverlay = errors.New("written to before a client stayed")

func (w *writable) Size() int64 { return w.base.Size() }

func (w *writable) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if o := w.over(); o != nil {
		return o.ReadAt(ctx, p, off)
	}
	return w.base.ReadAt(ctx, p, off)
}

func (w *writable) Extents(ctx context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	if o := w.over(); o != nil {
		return o.Extents(ctx, off, length, yield)
	}
	return w.base.Extents(ctx, off, length, yield)
}

func (w *writable) Prefetch(ctx context.Context, off, length int64) error {
	if o := w.over(); o != nil {
		return o.Prefetch(ctx, off, length)
	}
	if f, ok := w.base.(nbdserver.Prefetcher); ok {
		return f.Prefetch(ctx, off, length)
	}
	return nil
}

// Contexts lists those of the disk below.
func (w *writable) Contexts(ctx context.Context) ([]string, error) {
	if s, ok := w.base.(nbdserver.Statuser); ok {
		return s.Contexts(ctx)
	}
	return nil, nil
}

// HasContext is that of the disk below.
func (w *writable) HasContext(ctx context.Context, name string) bool {
	s, ok := w.base.(nbdserver.Statuser)
	return ok && s.HasContext(ctx, name)
}

// ContextName is that of the disk below.
func (w *writable) ContextName(ctx context.Context, name string) string {
	if n, ok := w.base.(nbdserver.ContextNamer); ok {
		return n.ContextName(ctx, name)
	}
	return name
}

// Status reports a context's flags. What was written has flag 1: it has depth 1, or is dirty.
// Elsewhere they are the flags of the disk below, whose depths are one more.
func (w *writable) Status(ctx context.Context, name string, off, length int64, yield func(int64, uint32) bool) error {
	base := w.base.(nbdserver.Statuser)
	o := w.over()
	if o == nil {
		return base.Status(ctx, name, off, length, yield)
	}
	var err error
	at, more := off, true
	unchanged := func(to int64) {
		for n := to - at; n > 0 && more && err == nil; n = to - at {
			err = base.Status(ctx, name, at, n, func(l int64, flags uint32) bool {
				l = min(l, to-at)
				at += l
				if name == contextDepth && flags > 0 {
					flags++
				}
				more = yield(l, flags)
				return more && at < to
			})
			if at == to-n {
				break // no flags
			}
		}
	}
	o.DirtyIn(off, length, func(start, n int64, _ bool) bool {
		if unchanged(start); err != nil || !more {
			return false
		}
		at = start + n
		more = yield(n, 1)
		return more
	})
	if err == nil && more {
		unchanged(off + length)
	}
	return err
}

func (w *writable) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	if o := w.over(); o != nil {
		return o.WriteAt(ctx, p, off)
	}
	return 0, errNoOverlay
}

func (w *writable) Flush(ctx context.Context) error {
	if o := w.over(); o != nil {
		return o.Flush(ctx)
	}
	return nil
}

func (w *writable) Trim(ctx context.Context, off, length int64) error {
	if o := w.over(); o != nil {
		return o.Trim(ctx, off, length)
	}
	return errNoOverlay
}

func (w *writable) Zero(ctx context.Context, off, length int64, keepSpace, fast bool) error {
	if o := w.over(); o != nil {
		return o.Zero(ctx, off, length, keepSpace, fast)
	}
	return errNoOverlay
}

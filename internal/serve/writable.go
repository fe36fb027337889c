package serve

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/nbdserver"
)

// writable is a disk that can be written to from when a client stays: only then is
// there an overlay, as looking at many exports must not make one for each.
type writable struct {
	base nbdserver.Export
	over atomic.Pointer[overlay.Overlay] // nil until a client stays
}

var (
	_ nbdserver.Writer     = (*writable)(nil)
	_ nbdserver.Lender     = (*writable)(nil)
	_ nbdserver.Prefetcher = (*writable)(nil)
	_ nbdserver.Statuser   = (*writable)(nil)

	_ nbdserver.ContextNamer = (*writable)(nil)
)

var errNoOverlay = errors.New("written to before a client stayed")

// top is what is read.
func (w *writable) top() nbdserver.Export {
	if o := w.over.Load(); o != nil {
		return o
	}
	return w.base
}

func (w *writable) Size() int64 { return w.base.Size() }

func (w *writable) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return w.top().ReadAt(ctx, p, off)
}

func (w *writable) Extents(ctx context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	return w.top().Extents(ctx, off, length, yield)
}

func (w *writable) Prefetch(ctx context.Context, off, length int64) error {
	if f, ok := w.top().(nbdserver.Prefetcher); ok {
		return f.Prefetch(ctx, off, length)
	}
	return nil
}

// Contexts and HasContext tell what a disk of this package tells, padded or not.
func (w *writable) Contexts(ctx context.Context) ([]string, error) {
	if s, ok := w.top().(nbdserver.Statuser); ok {
		return s.Contexts(ctx)
	}
	return nil, nil
}

func (w *writable) HasContext(ctx context.Context, name string) bool {
	s, ok := w.top().(nbdserver.Statuser)
	return ok && s.HasContext(ctx, name)
}

// ContextName is that of the disk beneath, whatever lies over it.
func (w *writable) ContextName(ctx context.Context, name string) string {
	if n, ok := w.base.(nbdserver.ContextNamer); ok {
		return n.ContextName(ctx, name)
	}
	return name
}

// Status tells what a disk of this package tells.
func (w *writable) Status(ctx context.Context, name string, off, length int64, yield func(int64, uint32) bool) error {
	return w.top().(nbdserver.Statuser).Status(ctx, name, off, length, yield)
}

func (w *writable) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	if o := w.over.Load(); o != nil {
		return o.WriteAt(ctx, p, off)
	}
	return 0, errNoOverlay
}

func (w *writable) Flush(ctx context.Context) error {
	if o := w.over.Load(); o != nil {
		return o.Flush(ctx)
	}
	return nil
}

func (w *writable) Trim(ctx context.Context, off, length int64) error {
	if o := w.over.Load(); o != nil {
		return o.Trim(ctx, off, length)
	}
	return errNoOverlay
}

func (w *writable) Zero(ctx context.Context, off, length int64, keepSpace, fast bool) error {
	if o := w.over.Load(); o != nil {
		return o.Zero(ctx, off, length, keepSpace, fast)
	}
	return errNoOverlay
}

func (w *writable) close() error {
	if o := w.over.Load(); o != nil {
		return o.Close()
	}
	return nil
}

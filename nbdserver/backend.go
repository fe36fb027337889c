package nbdserver

import (
	"context"
	"io"

	"github.com/varve-io/varve/nbdserver/proto"
)

// Backend is an export in the shape of go-nbd's backend.Backend
// (github.com/pojntfx/go-nbd/pkg/backend), so that a program that embeds
// go-nbd's server can serve it. It does not import go-nbd: the interface is
// met by its methods.
type Backend struct {
	ctx    context.Context
	export Export
}

// NewBackend adapts an export; ctx bounds its requests.
func NewBackend(ctx context.Context, e Export) *Backend { return &Backend{ctx: ctx, export: e} }

// ReadAt reads as io.ReaderAt does: io.EOF at the end of the export.
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	size := b.export.Size()
	if off < 0 || off > size {
		return 0, io.EOF
	}
	n := min(int64(len(p)), size-off)
	if n > 0 {
		if got, err := b.export.ReadAt(b.ctx, p[:n], off); err != nil {
			return got, err
		}
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// WriteAt writes, or fails with EPERM if the export is read-only.
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	w, ok := b.export.(Writer)
	if !ok {
		return 0, proto.EPERM
	}
	if size := b.export.Size(); off < 0 || off > size || int64(len(p)) > size-off {
		return 0, proto.ENOSPC
	}
	return w.WriteAt(b.ctx, p, off)
}

// Size returns the export's size in bytes.
func (b *Backend) Size() (int64, error) { return b.export.Size(), nil }

// Sync makes what was written durable.
func (b *Backend) Sync() error {
	if w, ok := b.export.(Writer); ok {
		return w.Flush(b.ctx)
	}
	return nil
}

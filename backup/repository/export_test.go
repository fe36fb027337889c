package repository

import (
	"context"
	"encoding/binary"
)

// WriteObjects makes a writer store blocks through Kopia's object writer; it reports
// whether that is a change.
func (w *Writer) WriteObjects() bool {
	direct := w.contents != nil
	w.contents = nil
	return direct
}

// ReadByKopia makes Kopia read all contents; it reports whether that is a change.
func (r *Repository) ReadByKopia() bool {
	direct := r.uncached
	r.uncached = false
	return direct
}

// ReadDirectly reads an object without Kopia's buffers.
func (r *Repository) ReadDirectly(ctx context.Context, oid ObjectID) ([]byte, error) {
	cid, _, _ := contentOf(oid)
	return r.decodeContent(ctx, cid)
}

// DecompressS2 decodes a block of S2 in place, if it can.
func DecompressS2(p []byte, n int) ([]byte, bool) {
	id := headerOf(DefaultCompression)
	out := &exactBuffer{make([]byte, 0, n)}
	ok := decompressS2(id, append(binary.BigEndian.AppendUint32(nil, uint32(id)), p...), out)
	return out.p, ok
}

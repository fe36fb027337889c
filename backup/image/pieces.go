package image

import "context"

// Piece is a block, a part of one at the edge of a range, or a run of zeroes.
type Piece struct {
	Offset, Length int64
	Zero           bool
	// Digest is the xxHash64 of the piece's bytes as the backup recorded it.
	// HasDigest is false for zeroes, parts of blocks, and objects that Varve did
	// not write.
	Digest    uint64
	HasDigest bool
}

// Pieces yields the pieces of a range, in order and without gaps, from indexes alone: for a
// reader that may know by the digest that a block need not be decoded. An error of yield ends
// the call and is returned unchanged.
func (m *Image) Pieces(ctx context.Context, off, length int64, yield func(Piece) error) error {
	if err := m.checkRange(off, length); err != nil {
		return err
	}
	return m.walk(ctx, off, off+length, func(p piece) error {
		out := Piece{Offset: p.off, Length: p.end - p.off, Zero: p.zero}
		if !p.zero && p.off == p.start && out.Length == p.entry.Length {
			out.Digest, out.HasDigest = p.entry.Digest, p.entry.HasDigest
		}
		return yield(out)
	})
}

// ReadOnce is ReadContext for a reader that reads the disk once: it adds no blocks to the
// cache, and does not read ahead.
func (m *Image) ReadOnce(ctx context.Context, p []byte, off int64) error {
	if err := m.checkRange(off, int64(len(p))); err != nil {
		return err
	}
	if m.hints {
		m.announceRange(ctx, off, off+int64(len(p)))
	}
	return m.walk(ctx, off, off+int64(len(p)), func(b piece) error {
		at := p[b.off-off : b.end-off]
		if b.zero {
			clear(at)
			return nil
		}
		data, err := m.blockOnce(ctx, b.entry)
		if err != nil {
			return blockError(b.start, err)
		}
		copy(at, data[b.off-b.start:])
		return nil
	})
}

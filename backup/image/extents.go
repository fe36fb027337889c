package image

import "context"

// Extent is a run of bytes of a disk.
type Extent struct {
	Offset, Length int64
	// Zero means a hole: the bytes are zeroes and not stored.
	Zero bool
	// Depth is how many recovery points back the bytes were written: 1 in this one, 2 in its
	// parent, and so on, whether or not those still exist. It is 0 for holes, and if unknown:
	// for objects that Varve did not write, or an image opened without a generation.
	Depth int64
}

// Extents yields the runs of a range in order, without gaps; neighbours differ in Zero or
// Depth. Only indexes are read. An error of yield ends the call and is returned unchanged.
func (m *Image) Extents(ctx context.Context, off, length int64, yield func(Extent) error) error {
	if err := m.checkRange(off, length); err != nil {
		return err
	}
	run := Extent{Offset: off}
	err := m.entries(ctx, off, off+length, func(p piece) error {
		depth := int64(0)
		if !p.zero && p.entry.Gen > 0 && m.gen >= p.entry.Gen {
			depth = m.gen - p.entry.Gen + 1
		}
		if run.Length > 0 && (run.Zero != p.zero || run.Depth != depth) {
			if err := yield(run); err != nil {
				return err
			}
			run = Extent{Offset: p.off}
		}
		run.Zero, run.Depth = p.zero, depth
		run.Length += p.end - p.off
		return nil
	})
	if err != nil || run.Length == 0 {
		return err
	}
	return yield(run)
}

package files

import (
	"bytes"
	"context"
	"errors"
	"io"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// sameState compares a file in two points: first metadata, then content where the disk
// changed below it.
func sameState(ctx context.Context, a, b *state) (bool, error) {
	if a.err != nil || b.err != nil {
		return a.err != nil && b.err != nil && a.err.Error() == b.err.Error(), nil
	}
	if a.stat == nil || b.stat == nil {
		return a.stat == b.stat, nil
	}
	x, y := a.stat, b.stat
	if a.info.Mode != b.info.Mode || a.info.Target != b.info.Target || x.UID != y.UID || x.GID != y.GID || x.Size != y.Size ||
		!x.Mtime.Equal(y.Mtime) || !x.Ctime.Equal(y.Ctime) || x.Major != y.Major || x.Minor != y.Minor {
		return false, nil
	}
	return sameContent(ctx, a, b)
}

// sameContent compares the content of two regular files of one size where the disk changed
// below them; other files have no content.
func sameContent(ctx context.Context, a, b *state) (bool, error) {
	if a.file == nil || b.file == nil {
		return (a.file == nil) == (b.file == nil), nil
	}
	// Data of either is compared, unless the disk did not change there.
	for _, s := range []*state{b, a} {
		for off := int64(0); ; {
			e, err := s.file.NextData(off)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return false, err
			}
			off = e.Offset + e.Length
			ranges, err := suspects(ctx, a, b, e)
			if err != nil {
				return false, err
			}
			for _, r := range ranges {
				if same, err := equalBytes(ctx, a.file, b.file, r.Offset, r.Length); err != nil || !same {
					return false, err
				}
			}
		}
	}
	return true, nil
}

// suspects lists the ranges of the file, within a range of data, that may differ: what was
// written on the disk between the points, or all if the two are not at the same place.
func suspects(ctx context.Context, a, b *state, e diskfs.Extent) ([]diskfs.Extent, error) {
	all := []diskfs.Extent{e}
	if e.Device < 0 {
		return all, nil
	}
	for _, s := range []*state{a, b} {
		for off := e.Offset; off < e.Offset+e.Length; {
			x, err := s.file.NextData(off)
			if err != nil || x.Offset != off || x.Device != e.Device+off-e.Offset {
				return all, nil //nolint:nilerr // the comparison of bytes meets the error again
			}
			off += x.Length
		}
	}
	var list []diskfs.Extent
	// A hostile image may end within the last block of a file.
	for off, end := e.Device, min(e.Device+e.Length, a.on.Size, b.on.Size); off < end; {
		was, n := a.on.Locate(off)
		at, m := b.on.Locate(off)
		n = min(n, m, end-off)
		if n <= 0 || at != was || at+n > min(a.files.held.Size(), b.files.held.Size()) {
			return all, nil
		}
		err := b.files.held.Image().ChangedSince(ctx, a.files.held.Image(), at, n, func(start, length int64, changed bool) error {
			if changed {
				list = append(list, diskfs.Extent{Offset: e.Offset + off - e.Device + start - at, Length: length})
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		off += n
	}
	return list, nil
}

func equalBytes(ctx context.Context, a, b io.ReaderAt, off, length int64) (bool, error) {
	const unit = 1 << 20
	x, y := make([]byte, min(unit, length)), make([]byte, min(unit, length))
	for end := off + length; off < end; off += unit {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n := int(min(unit, end-off))
		for _, r := range []struct {
			r io.ReaderAt
			p []byte
		}{{a, x[:n]}, {b, y[:n]}} {
			if _, err := r.r.ReadAt(r.p, off); err != nil && !errors.Is(err, io.EOF) {
				return false, err
			}
		}
		if !bytes.Equal(x[:n], y[:n]) {
			return false, nil
		}
	}
	return true, nil
}

package nbdserver

import (
	"context"
)

// Pad rounds an export's size up to a multiple of align bytes with zeroes, for clients that
// count in sectors (the Linux kernel drops a partial last one). The result is read-only,
// since the padding cannot be written: pad a disk below its overlay. An export of fitting
// size is returned unchanged.
func Pad(e Export, align int64) Export {
	size := e.Size()
	padded := (size + align - 1) / align * align
	if padded == size {
		return e
	}
	return &paddedExport{inner: e, size: size, padded: padded}
}

type paddedExport struct {
	inner        Export
	size, padded int64
}

func (p *paddedExport) Size() int64 { return p.padded }

func (p *paddedExport) ReadAt(ctx context.Context, b []byte, off int64) (int, error) {
	in := min(max(p.size-off, 0), int64(len(b)))
	if in > 0 {
		if n, err := p.inner.ReadAt(ctx, b[:in], off); err != nil {
			return n, err
		}
	}
	clear(b[in:])
	return len(b), nil
}

func (p *paddedExport) Extents(ctx context.Context, off, length int64, yield func(int64, bool, bool) bool) error {
	in := min(max(p.size-off, 0), length)
	if in > 0 {
		told, more := int64(0), true
		err := p.inner.Extents(ctx, off, in, func(n int64, hole, zero bool) bool {
			n = min(n, in-told)
			told += n
			more = yield(n, hole, zero)
			return more && told < in
		})
		if err != nil || !more {
			return err
		}
	}
	if length > in {
		yield(length-in, true, true)
	}
	return nil
}

// Contexts and HasContext pass on those of the inner export; the padding has no flags.
func (p *paddedExport) Contexts(ctx context.Context) ([]string, error) {
	if s, ok := p.inner.(Statuser); ok {
		return s.Contexts(ctx)
	}
	return nil, nil
}

func (p *paddedExport) HasContext(ctx context.Context, name string) bool {
	s, ok := p.inner.(Statuser)
	return ok && s.HasContext(ctx, name)
}

// ContextName is the inner export's.
func (p *paddedExport) ContextName(ctx context.Context, name string) string {
	return contextName(ctx, p.inner, name)
}

// Status passes on the inner export's flags.
func (p *paddedExport) Status(ctx context.Context, name string, off, length int64, yield func(int64, uint32) bool) error {
	in := min(max(p.size-off, 0), length)
	if in > 0 {
		told, more := int64(0), true
		err := p.inner.(Statuser).Status(ctx, name, off, in, func(n int64, flags uint32) bool {
			n = min(n, in-told)
			told += n
			more = yield(n, flags)
			return more && told < in
		})
		if err != nil || !more {
			return err
		}
	}
	if length > in {
		yield(length-in, 0)
	}
	return nil
}

// Lend lends what the inner export lends, and the padding as zeroes.
func (p *paddedExport) Lend(ctx context.Context, dst []Piece, off int64, n int, wait bool) ([]Piece, error) {
	l, ok := p.inner.(Lender)
	if !ok {
		return dst, ErrNotCached
	}
	in := int(min(max(p.size-off, 0), int64(n)))
	if in > 0 {
		var err error
		if dst, err = l.Lend(ctx, dst, off, in, wait); err != nil {
			return dst, err
		}
	}
	if n > in {
		dst = append(dst, Piece{Zeroes: n - in})
	}
	return dst, nil
}

// Prefetch passes the hint on for the part that exists.
func (p *paddedExport) Prefetch(ctx context.Context, off, length int64) error {
	f, ok := p.inner.(Prefetcher)
	if length = min(length, p.size-off); !ok || length <= 0 {
		return nil
	}
	return f.Prefetch(ctx, off, length)
}

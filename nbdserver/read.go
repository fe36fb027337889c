package nbdserver

import (
	"context"
	"errors"

	"github.com/varve-io/varve/internal/zero"
	"github.com/varve-io/varve/nbdserver/proto"
)

// minHole is the shortest run of zeroes worth a chunk of its own.
const minHole = 4096

// zeroPage holds zeroes that must be sent as data.
var zeroPage [64 << 10]byte

// readLent answers a read at once if the export lends all its bytes without
// waiting. It runs on the reading goroutine.
func (c *conn) readLent(r *request) bool {
	if r.length == 0 {
		c.sendDone(r)
		return true
	}
	pieces, err := c.lender.Lend(c.ctx, c.lent[:0], int64(r.offset), int(r.length), false)
	if err != nil {
		return false
	}
	c.lent = pieces
	c.replies = c.sendPieces(r, pieces, nil, c.replies[:0])
	clear(c.lent)
	clear(c.replies)
	return true
}

// read answers a read on a worker.
func (c *conn) read(r *request) {
	switch {
	case r.length == 0:
		c.sendDone(r)
		return
	case r.piece > 0:
		c.readByPieces(r)
		return
	}
	pieces, err := c.gatherInTime(int64(r.offset), int(r.length))
	if len(pieces) == 0 {
		c.exportError(r, err, int64(r.offset))
		return
	}
	c.sendPieces(r, pieces, err, nil)
}

// readByPieces answers a read with one or more chunks for each of its pieces, as memory
// becomes free.
func (c *conn) readByPieces(r *request) {
	if p, ok := c.opened.Export.(Prefetcher); ok {
		_ = p.Prefetch(c.ctx, int64(r.offset), int64(r.length)) // a failure will show in the read
	}
	off, end := int64(r.offset), int64(r.offset+r.length)
	for n := int64(r.piece); ; {
		pieces, err := c.gatherInTime(off, int(n))
		if len(pieces) == 0 {
			c.exportError(r, err, off)
			return
		}
		c.hold(r, pieces, int(n))
		off += n
		last := off == end || err != nil
		c.failedLater(r, err)
		c.out.push(c.structuredRead(r, uint64(off-n), pieces, err, last, nil)...)
		if last {
			c.count(r, errnoOf(err))
			return
		}
		c.out.flush()
		size, g, err := c.takePiece(int(end - off))
		if err != nil {
			return // so does the connection
		}
		n, r.mem = int64(size), g
	}
}

// gatherInTime is gather within Config.ReadTimeout.
func (c *conn) gatherInTime(off int64, n int) ([]Piece, error) {
	ctx, cancel := c.readContext()
	defer cancel()
	pieces, err := c.gather(ctx, off, n)
	return pieces, c.late(ctx, err, off)
}

// gather gets the bytes of a range, lent by the export or read. With an error it returns the
// pieces before it.
func (c *conn) gather(ctx context.Context, off int64, n int) ([]Piece, error) {
	if c.lender != nil {
		pieces, err := c.lender.Lend(ctx, nil, off, n, true)
		oe := (*OffsetError)(nil)
		switch {
		case errors.Is(err, ErrNotCached): // nothing to lend: read
		case err != nil && !errors.As(err, &oe):
			return nil, err
		default:
			return pieces, err
		}
	}
	buf := getBuffer(n)
	pieces, err := c.fill(ctx, off, buf)
	if len(pieces) == 0 {
		buf.Release()
		return nil, err
	}
	pieces[len(pieces)-1].Owner = buf // released with the last reply
	return pieces, err
}

// fill reads a range into buf and reports which parts of it are zeroes. With an error it
// returns the pieces before it.
func (c *conn) fill(ctx context.Context, off int64, buf *buffer) ([]Piece, error) {
	if len(buf.b) > 64<<10 {
		if pieces, ok := c.fillByExtents(ctx, off, buf.b); ok {
			return pieces, nil
		}
	}
	n, err := c.opened.ReadAt(ctx, buf.b, off)
	if err != nil {
		n = min(max(n, 0), len(buf.b)-1)
		if n == 0 {
			return nil, at(err, off)
		}
		return []Piece{{Data: buf.b[:n]}}, at(err, off+int64(n))
	}
	if zero.Only(buf.b) {
		return []Piece{{Zeroes: len(buf.b)}}, nil
	}
	return []Piece{{Data: buf.b}}, nil
}

// fillByExtents reads only what is not known to be zero. On any error it gives up, and a
// plain read will report it.
func (c *conn) fillByExtents(ctx context.Context, off int64, b []byte) ([]Piece, bool) {
	var pieces []Piece
	pos := 0
	err := c.opened.Extents(ctx, off, int64(len(b)), func(n int64, _, zero bool) bool {
		l := int(min(n, int64(len(b)-pos)))
		if l <= 0 {
			return false
		}
		last := len(pieces) - 1
		switch {
		case zero && l >= minHole:
			pieces = append(pieces, Piece{Zeroes: l})
		case last >= 0 && pieces[last].Data != nil:
			d := &pieces[last]
			d.Data = b[pos-len(d.Data) : pos+l]
		default:
			pieces = append(pieces, Piece{Data: b[pos : pos+l]})
		}
		pos += l
		return pos < len(b)
	})
	if err != nil || pos < len(b) {
		return nil, false
	}
	pos = 0
	for _, p := range pieces {
		if p.Data != nil {
			if _, err := c.opened.ReadAt(ctx, p.Data, off+int64(pos)); err != nil {
				return nil, false
			}
		}
		pos += len(p.Data) + p.Zeroes
	}
	return pieces, true
}

// at adds the offset to an error, unless it has one.
func at(err error, off int64) error {
	var oe *OffsetError
	if errors.As(err, &oe) {
		return err
	}
	return &OffsetError{Offset: off, Err: err}
}

// sendPieces answers a read with the export's pieces, in order; err is the error after the
// last piece. scratch is reused for the replies.
func (c *conn) sendPieces(r *request, pieces []Piece, err error, scratch []outgoing) []outgoing {
	switch {
	case c.style == styleSimple && err != nil:
		// The header says whether data follows: too late for an error after it.
		release(pieces)
		c.exportError(r, err, int64(r.offset))
		return scratch
	case c.style == styleSimple:
		c.hold(r, pieces, int(r.length))
		scratch = c.simpleRead(r, pieces, scratch)
	case r.flags&proto.CmdFlagDF != 0 && err != nil:
		release(pieces)
		c.exportError(r, err, int64(r.offset))
		return scratch
	default:
		c.hold(r, pieces, int(r.length))
		c.failedLater(r, err)
		scratch = c.structuredRead(r, r.offset, pieces, err, true, scratch)
	}
	c.count(r, errnoOf(err))
	c.out.push(scratch...)
	return scratch
}

func release(pieces []Piece) {
	for _, p := range pieces {
		if p.Owner != nil {
			p.Owner.Release()
		}
	}
}

// simpleRead returns a header and all bytes.
func (c *conn) simpleRead(r *request, pieces []Piece, out []outgoing) []outgoing {
	out = append(out, outgoing{})
	putSimple(&out[0], 0, r.cookie)
	for _, p := range pieces {
		out = appendBytes(out, p)
	}
	out[len(out)-1].granted = r.mem
	return out
}

// appendBytes adds a piece as bytes, zeroes written out.
func appendBytes(out []outgoing, p Piece) []outgoing {
	for z := p.Zeroes; p.Data == nil && z > 0; {
		n := min(z, len(zeroPage))
		out = appendData(out, zeroPage[:n])
		z -= n
	}
	if p.Data != nil {
		out = appendData(out, p.Data)
	}
	if p.Owner != nil {
		out[len(out)-1].owner = p.Owner
	}
	return out
}

// appendData adds bytes to the last entry if it has none, else as a new one.
func appendData(out []outgoing, b []byte) []outgoing {
	if last := &out[len(out)-1]; last.data == nil && last.owner == nil {
		last.data = b
		return out
	}
	return append(out, outgoing{data: b})
}

// structuredRead returns a chunk for each run of data and each hole, from pos. last means
// that the reply ends with them.
func (c *conn) structuredRead(r *request, pos uint64, pieces []Piece, err error, last bool, out []outgoing) []outgoing {
	head := 0 // start of the current chunk in out
	// Don't fragment: one chunk, zeroes written out.
	whole := r.flags&proto.CmdFlagDF != 0 && len(pieces) > 1
	isHole := func(p Piece) bool {
		return p.Data == nil && !whole && (p.Zeroes >= minHole || len(pieces) == 1)
	}
	for i := 0; i < len(pieces); {
		head = len(out)
		out = append(out, outgoing{})
		if p := pieces[i]; isHole(p) {
			c.putHole(&out[head], r, pos, uint32(p.Zeroes))
			out[head].owner = p.Owner
			pos += uint64(p.Zeroes)
			i++
			continue
		}
		n := 0
		for ; i < len(pieces) && !isHole(pieces[i]); i++ {
			if p := pieces[i]; p.Data != nil {
				n += len(p.Data)
			} else {
				n += p.Zeroes
			}
			out = appendBytes(out, pieces[i])
		}
		c.putData(&out[head], r, pos, n)
		pos += uint64(n)
	}
	switch {
	case err != nil:
		out = append(out, c.errorChunk(r, errnoOf(err), err.Error(), offsetOf(err, int64(r.offset))))
	case last:
		setDone(&out[head])
	}
	out[len(out)-1].granted = r.mem
	return out
}

package nbdserver

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/nbdserver/proto"
)

// takeMemory waits until the memory of a request without payload is free. While it is short,
// requests that can be processed in pieces get that of the first one. Replies that hold
// memory are sent before waiting.
func (c *conn) takeMemory(r *request) error {
	n := int64(minRequestCost)
	piece := 0
	switch r.cmd {
	case proto.CmdRead:
		if r.length > 0 {
			n += bufferCost(int(r.length))
		}
		// A simple reply, or one without fragments, is sent as a whole.
		if r.length > smallPiece && c.style != styleSimple && r.flags&proto.CmdFlagDF == 0 {
			piece = smallPiece
		}
	case proto.CmdBlockStatus:
		n += statusMemory
		piece = smallPiece // a reply may report less
	}
	n = min(n, c.srv.cfg.ConnectionMemory, c.srv.cfg.TotalMemory)
	if g, ok := c.mem.try(n); ok {
		r.mem = g
		return nil
	}
	if piece > 0 {
		n, r.piece = minRequestCost+int64(piece), piece
	}
	return c.takeMemoryFor(r, n)
}

func (c *conn) takeMemoryFor(r *request, n int64) error {
	g, err := c.waitMemory(n)
	r.mem = g
	return err
}

// waitMemory waits for memory, and sends replies that hold some.
func (c *conn) waitMemory(n int64) (grant, error) {
	if g, ok := c.mem.try(n); ok {
		return g, nil
	}
	c.out.flush()
	return c.mem.acquire(c.ctx, n)
}

// takePiece takes the memory of the next piece of a request: of n bytes, or of
// less while memory is short.
func (c *conn) takePiece(n int) (int, grant, error) {
	n = min(n, largePiece)
	if g, ok := c.mem.try(bufferCost(n)); ok {
		return n, g, nil
	}
	n = min(n, smallPiece)
	g, err := c.waitMemory(bufferCost(n))
	return n, g, err
}

// writing is a WRITE whose payload is written by pieces, as it arrives: no client
// holds memory for bytes that it only announced.
type writing struct {
	r    request
	left atomic.Int64 // pieces in progress, and one while the payload is read

	mu  sync.Mutex
	err error // the first one of the disk
	at  int64 // where
}

// receiveWrite reads the payload of a WRITE and writes it in pieces.
func (c *conn) receiveWrite(r *request) error {
	if err := c.takeMemoryFor(r, minRequestCost); err != nil {
		return err
	}
	w := &writing{r: *r}
	w.left.Store(1)
	pace := c.srv.newPace()
	off, end := int64(r.offset), int64(r.offset+r.length)
	for off < end {
		if err := c.awaitPayload(&pace); err != nil {
			return err
		}
		// Pieces are aligned like those of other requests.
		n := min(end-off, largePiece-off%largePiece)
		size, g, err := c.takePiece(int(n))
		if err != nil {
			return err
		}
		if int64(size) < n {
			size -= int((off + int64(size)) % smallPiece)
		}
		buf := getBuffer(size)
		if err := c.readFull(buf.b, &pace); err != nil {
			return err
		}
		at := off
		off += int64(size)
		w.left.Add(1)
		if err := c.dispatchChange(func() { c.writePiece(w, buf, g, at) }); err != nil {
			return err
		}
	}
	if w.left.Add(-1) > 0 {
		return nil // the last piece answers
	}
	return c.dispatch(func() { c.wrote(w) })
}

// writePiece writes one piece of a WRITE; the last one answers.
func (c *conn) writePiece(w *writing, buf *buffer, g grant, off int64) {
	_, err := c.writer.WriteAt(c.ctx, buf.b, off)
	buf.Release()
	c.mem.release(g)
	if err != nil {
		w.mu.Lock()
		if at := offsetOf(err, off); w.err == nil || at < w.at {
			w.err, w.at = err, at
		}
		w.mu.Unlock()
	}
	if w.left.Add(-1) == 0 {
		c.wrote(w)
	}
}

// wrote answers a WRITE whose pieces are all done.
func (c *conn) wrote(w *writing) {
	if w.err != nil {
		c.exportError(&w.r, w.err, w.at)
		return
	}
	c.finish(&w.r)
}

// awaitPayload waits for the next byte of a payload.
func (c *conn) awaitPayload(pace *pace) error {
	if c.br.Buffered() > 0 {
		return nil
	}
	c.out.flush()
	began := time.Now()
	c.setReadDeadline(pace.deadline(began))
	_, err := c.br.Peek(1)
	pace.moved(0, time.Since(began))
	if err != nil {
		return midMessage(err)
	}
	c.setReadDeadline(time.Time{})
	return nil
}

// readFull reads from the client, which must keep its pace.
func (c *conn) readFull(p []byte, pace *pace) error {
	if c.br.Buffered() >= len(p) {
		_, err := io.ReadFull(c.br, p)
		return err
	}
	c.out.flush()
	for len(p) > 0 {
		began := time.Now()
		c.setReadDeadline(pace.deadline(began))
		n, err := c.br.Read(p)
		pace.moved(n, time.Since(began))
		p = p[n:]
		if err != nil && len(p) > 0 {
			return midMessage(err)
		}
	}
	c.setReadDeadline(time.Time{})
	return nil
}

// midMessage returns the error of a read in the middle of a message.
func midMessage(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	case timedOut(err):
		return errStalled
	}
	return err
}

var errStalled = errors.New("client stopped in the middle of a message, or was too slow")

// discardPayload reads and drops a payload.
func (c *conn) discardPayload(n uint64) error {
	pace := c.srv.newPace()
	b := getBuffer(64 << 10)
	defer b.Release()
	for n > 0 {
		part := b.b[:min(n, uint64(len(b.b)))]
		if err := c.readFull(part, &pace); err != nil {
			return err
		}
		n -= uint64(len(part))
	}
	return nil
}

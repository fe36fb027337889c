package nbdserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/varve-io/varve/nbdserver/proto"
)

// request is one command of a client, with the memory it may use.
type request struct {
	cmd    proto.Command
	flags  uint16
	cookie uint64
	offset uint64
	length uint64  // of the export's range
	data   *buffer // payload of a write
	only   []uint32
	start  time.Time
	mem    grant // moves to the last reply
	piece  int   // bytes to handle at a time; 0 for all at once
}

// transmit reads requests until the client leaves. Replies in progress are sent before it
// returns.
func (c *conn) transmit() error {
	c.mem = c.srv.memory.join(c.owner(), c.srv.cfg.ConnectionMemory)
	defer c.mem.leave()
	c.out = newOutbox(c.nc, c.srv.newPace, c.mem, func(err error) {
		c.cancel(fmt.Errorf("send replies: %w", err))
		_ = c.socket.Close() // ends the reading side, too
	})
	if c.srv.cfg.Metrics != nil {
		c.counted = c.srv.cfg.Metrics.Connected(c.opened.Name)
		defer c.counted.Disconnected()
	}
	c.log.Debug("client connected", "flags", fmt.Sprintf("%#x", uint16(c.flags)))
	_ = c.socket.SetReadDeadline(time.Time{})
	err := c.guard(c.readRequests)
	if !errors.Is(err, errDone) && !errors.Is(err, errClosing) && !errors.Is(err, io.EOF) && !timedOut(err) {
		c.cancel(err) // no client reads replies to requests in flight
	}
	c.workers.Wait()
	c.out.close()
	return err
}

// readRequests is the loop of the connection's goroutine.
func (c *conn) readRequests() error {
	size := proto.RequestSize
	if c.style == styleExtended {
		size = proto.ExtendedRequestSize
	}
	for {
		h, err := c.nextHeader(size)
		if err != nil {
			return err
		}
		var r request
		magic := binary.BigEndian.Uint32(h)
		r.flags = binary.BigEndian.Uint16(h[4:])
		r.cmd = proto.Command(binary.BigEndian.Uint16(h[6:]))
		r.cookie = binary.BigEndian.Uint64(h[8:])
		r.offset = binary.BigEndian.Uint64(h[16:])
		want := proto.MagicRequest
		if c.style == styleExtended {
			want = proto.MagicExtendedRequest
			r.length = binary.BigEndian.Uint64(h[24:])
		} else {
			r.length = uint64(binary.BigEndian.Uint32(h[24:]))
		}
		if magic != want {
			return fmt.Errorf("client sent request magic %#x", magic)
		}
		if _, err := c.br.Discard(size); err != nil {
			return err
		}
		if c.counted != nil {
			r.start = time.Now()
		}
		if r.cmd == proto.CmdDisconnect {
			return errDone
		}
		if err := c.handle(&r); err != nil {
			return err
		}
	}
}

// nextHeader returns the next request's header without consuming it. Before
// it waits for the client, it sends the replies that are ready.
func (c *conn) nextHeader(size int) ([]byte, error) {
	for {
		if c.closing.Load() {
			return nil, errClosing
		}
		want, stalled := size, false
		have := c.br.Buffered()
		if have >= size {
			return c.br.Peek(size)
		}
		c.out.flush()
		if !c.enterPhase(phaseWaiting) {
			return nil, errClosing
		}
		if have > 0 { // the rest must not take long
			stalled = true
			c.setReadDeadline(time.Now().Add(c.srv.cfg.StallTimeout))
		} else {
			want = 1
			if c.srv.cfg.IdleTimeout > 0 {
				c.setReadDeadline(time.Now().Add(c.srv.cfg.IdleTimeout))
			}
		}
		h, err := c.br.Peek(want)
		if !c.enterPhase(phaseRequest) {
			return nil, errClosing
		}
		switch {
		case err == nil && stalled:
			c.setReadDeadline(time.Time{})
			return h, nil
		case err == nil:
			continue
		case !timedOut(err):
			if errors.Is(err, io.EOF) && len(h) > 0 {
				return nil, io.ErrUnexpectedEOF
			}
			return nil, err
		case stalled:
			return nil, errStalled
		case c.busy.Load() == 0:
			return nil, err
		}
		// Requests in flight are not idleness.
	}
}

// hasPayload reports whether the client sends r.length bytes with the request.
func (c *conn) hasPayload(r *request) bool {
	if c.style == styleExtended {
		return r.flags&proto.CmdFlagPayloadLen != 0
	}
	return r.cmd == proto.CmdWrite
}

// handle validates one request and answers it or starts its work. An error
// ends the connection.
func (c *conn) handle(r *request) error {
	payload := c.hasPayload(r)
	if payload && r.length > proto.MaxPayload {
		// Stay in step with a client that is slightly wrong, but do not read gigabytes for
		// it; with extended headers the protocol says to hang up.
		if c.style == styleExtended || r.length > 4*proto.MaxPayload {
			return fmt.Errorf("client sends a payload of %d bytes", r.length)
		}
		if err := c.discardPayload(r.length); err != nil {
			return err
		}
		return c.refuse(r, proto.EINVAL, "payload is larger than 32 MiB")
	}
	errno, text := c.check(r, payload)
	if errno != 0 {
		if payload {
			if err := c.discardPayload(r.length); err != nil {
				return err
			}
		}
		return c.refuse(r, errno, text)
	}
	if r.cmd == proto.CmdWrite && r.length > 0 {
		return c.receiveWrite(r)
	}
	if err := c.takeMemory(r); err != nil {
		return err
	}
	if payload && r.cmd == proto.CmdBlockStatus {
		pace := c.srv.newPace()
		r.data = getBuffer(int(r.length))
		if err := c.readFull(r.data.b, &pace); err != nil {
			return err
		}
		if !c.filterStatus(r) {
			r.data.Release()
			return c.refuse(r, proto.EINVAL, "list of metadata contexts is malformed")
		}
	}
	if r.cmd == proto.CmdRead {
		if c.lender != nil && c.readLent(r) {
			return nil
		}
	}
	w := *r
	switch r.cmd {
	case proto.CmdWrite, proto.CmdTrim, proto.CmdWriteZeroes:
		return c.dispatchChange(func() { c.work(&w) })
	}
	return c.dispatch(func() { c.work(&w) })
}

// check validates a request against the protocol and the export.
func (c *conn) check(r *request, payload bool) (proto.Errno, string) {
	allowed := uint16(0)
	switch r.cmd {
	case proto.CmdRead:
		if c.flags&proto.FlagSendDF != 0 {
			allowed = proto.CmdFlagDF
		}
	case proto.CmdWrite:
		if c.style == styleExtended {
			allowed = proto.CmdFlagPayloadLen
			if !payload {
				return proto.EINVAL, "write without payload"
			}
		}
	case proto.CmdFlush, proto.CmdTrim, proto.CmdCache:
	case proto.CmdWriteZeroes:
		allowed = proto.CmdFlagNoHole | proto.CmdFlagFastZero
	case proto.CmdBlockStatus:
		allowed = proto.CmdFlagReqOne
		if c.flags&proto.FlagBlockStatusPayload != 0 {
			allowed |= proto.CmdFlagPayloadLen
		}
	default:
		return proto.EINVAL, "unknown command"
	}
	if c.flags&proto.FlagSendFUA != 0 {
		allowed |= proto.CmdFlagFUA
	}
	if bad := r.flags &^ allowed; bad != 0 {
		switch {
		case c.writer == nil && (r.cmd == proto.CmdWrite || r.cmd == proto.CmdTrim || r.cmd == proto.CmdWriteZeroes):
			return proto.EPERM, "export is read-only"
		case r.cmd == proto.CmdRead && bad == proto.CmdFlagDF:
			return proto.EINVAL, "DF flag without structured replies"
		}
		return proto.EINVAL, fmt.Sprintf("command flags %#x are not valid here", bad)
	}
	if r.cmd == proto.CmdBlockStatus && payload {
		return c.checkStatusPayload(r)
	}
	return c.checkRange(r)
}

// checkRange validates the range of a request.
func (c *conn) checkRange(r *request) (proto.Errno, string) {
	switch r.cmd {
	case proto.CmdFlush:
		if r.offset != 0 || r.length != 0 {
			return proto.EINVAL, "flush takes no range"
		}
		return 0, ""
	case proto.CmdWrite, proto.CmdTrim, proto.CmdWriteZeroes:
		if c.writer == nil {
			return proto.EPERM, "export is read-only"
		}
	case proto.CmdBlockStatus:
		if len(c.contexts) == 0 {
			return proto.EINVAL, "no metadata context was selected"
		}
		if r.length == 0 {
			return proto.EINVAL, "block status of no bytes"
		}
	}
	size := uint64(c.size)
	if r.offset > size || r.length > size-r.offset {
		if r.cmd == proto.CmdWrite || r.cmd == proto.CmdWriteZeroes {
			return proto.ENOSPC, "request goes beyond the end of the export"
		}
		return proto.EINVAL, "request goes beyond the end of the export"
	}
	if r.cmd == proto.CmdRead && r.length > proto.MaxPayload {
		if c.style == styleSimple {
			return proto.EINVAL, "read is larger than 32 MiB"
		}
		return proto.EOVERFLOW, "read is larger than 32 MiB"
	}
	return 0, ""
}

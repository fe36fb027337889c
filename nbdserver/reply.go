package nbdserver

import (
	"encoding/binary"
	"errors"
	"syscall"
	"time"

	"github.com/varve-io/varve/nbdserver/proto"
)

// maxErrorText keeps an error's text well below the protocol's 4096 bytes.
const maxErrorText = 1024

func putSimple(e *outgoing, errno proto.Errno, cookie uint64) {
	binary.BigEndian.PutUint32(e.header[0:], proto.MagicSimpleReply)
	binary.BigEndian.PutUint32(e.header[4:], uint32(errno))
	binary.BigEndian.PutUint64(e.header[8:], cookie)
	e.hlen = proto.SimpleReplySize
}

// putChunk writes the header of a chunk whose payload is n bytes and returns the space for
// its fixed payload.
func (c *conn) putChunk(e *outgoing, r *request, typ uint16, n int) []byte {
	h := e.header[:]
	binary.BigEndian.PutUint16(h[4:], 0)
	binary.BigEndian.PutUint16(h[6:], typ)
	binary.BigEndian.PutUint64(h[8:], r.cookie)
	if c.style == styleExtended {
		binary.BigEndian.PutUint32(h[0:], proto.MagicExtendedReply)
		binary.BigEndian.PutUint64(h[16:], r.offset)
		binary.BigEndian.PutUint64(h[24:], uint64(n))
		e.hlen = proto.ExtendedReplyHeaderSize
	} else {
		binary.BigEndian.PutUint32(h[0:], proto.MagicStructuredReply)
		binary.BigEndian.PutUint32(h[16:], uint32(n))
		e.hlen = proto.StructuredReplyHeaderSize
	}
	return h[e.hlen:]
}

// setDone marks a chunk as its reply's last.
func setDone(e *outgoing) { binary.BigEndian.PutUint16(e.header[4:], proto.ReplyFlagDone) }

// putData writes the head of an OFFSET_DATA chunk of n bytes at pos.
func (c *conn) putData(e *outgoing, r *request, pos uint64, n int) {
	p := c.putChunk(e, r, proto.ChunkOffsetData, 8+n)
	binary.BigEndian.PutUint64(p, pos)
	e.hlen += 8
}

// putHole writes an OFFSET_HOLE chunk.
func (c *conn) putHole(e *outgoing, r *request, pos uint64, n uint32) {
	p := c.putChunk(e, r, proto.ChunkOffsetHole, 12)
	binary.BigEndian.PutUint64(p, pos)
	binary.BigEndian.PutUint32(p[8:], n)
	e.hlen += 12
}

// sendDone reports success of a request without data.
func (c *conn) sendDone(r *request) {
	var e outgoing
	if c.style == styleExtended || c.style == styleStructured && r.cmd == proto.CmdRead {
		c.putChunk(&e, r, proto.ChunkNone, 0)
		setDone(&e)
	} else {
		putSimple(&e, 0, r.cookie)
	}
	e.granted = r.mem
	c.count(r, 0)
	c.out.push(e)
}

// exportError answers with an error of the export, and logs it. A connection that is ending
// sends no answer: the client may repeat the request on the next one.
func (c *conn) exportError(r *request, err error, off int64) {
	if c.ctx.Err() != nil {
		c.mem.release(r.mem)
		return
	}
	errno := errnoOf(err)
	off = offsetOf(err, off)
	if errno == proto.ENOTSUP && r.flags&proto.CmdFlagFastZero == 0 {
		errno = proto.EIO // the protocol has it for FAST_ZERO only
	}
	if errno != proto.ENOTSUP {
		c.logFailure(r, err, off)
	}
	c.sendError(r, errno, err.Error(), off)
}

// failedLater logs the error after the first bytes of a read, if there is one.
func (c *conn) failedLater(r *request, err error) {
	if err != nil && c.ctx.Err() == nil {
		c.logFailure(r, err, offsetOf(err, int64(r.offset)))
	}
}

// loggedFailures is how many failed requests of a connection are logged. A salvage tool may
// read each sector of a lost block, and a client may write to a full overlay forever: neither
// must fill the server's disk.
const loggedFailures = 20

func (c *conn) logFailure(r *request, err error, off int64) {
	switch n := c.failed.Add(1); {
	case n <= loggedFailures:
		c.log.Warn("request failed", "cmd", r.cmd.String(), "offset", off, "err", err)
		if n == loggedFailures {
			c.log.Warn("more requests of this connection that fail are counted, not logged")
		}
	default:
		c.log.Debug("request failed", "cmd", r.cmd.String(), "offset", off, "err", err)
	}
}

// sendError answers with an error. off < 0: it has no offset.
func (c *conn) sendError(r *request, errno proto.Errno, text string, off int64) {
	var e outgoing
	if c.style == styleSimple {
		putSimple(&e, errno, r.cookie)
	} else {
		e = c.errorChunk(r, errno, text, off)
	}
	e.granted = r.mem
	c.count(r, errno)
	c.out.push(e)
}

// errorChunk returns the last chunk of a failed reply, with a text for people.
func (c *conn) errorChunk(r *request, errno proto.Errno, text string, off int64) outgoing {
	var e outgoing
	text = cutString(text)
	if len(text) > maxErrorText {
		text = cutString(text[:maxErrorText])
	}
	typ, n := proto.ChunkError, 6+len(text)
	if off >= 0 && uint64(off) >= r.offset && uint64(off)-r.offset < max(r.length, 1) {
		typ, n = proto.ChunkErrorOffset, n+8
	}
	p := c.putChunk(&e, r, typ, n)
	binary.BigEndian.PutUint32(p, uint32(errno))
	binary.BigEndian.PutUint16(p[4:], uint16(len(text)))
	e.hlen += 6
	e.data = []byte(text)
	if typ == proto.ChunkErrorOffset {
		e.data = binary.BigEndian.AppendUint64(e.data, uint64(off))
	}
	setDone(&e)
	return e
}

// count reports an answered request to the metrics.
func (c *conn) count(r *request, errno proto.Errno) {
	if c.counted != nil {
		c.counted.Request(r.cmd, int64(r.length), time.Since(r.start), errno)
	}
}

// errnoOf maps an export's error to the protocol's numbers.
func errnoOf(err error) proto.Errno {
	if err == nil {
		return 0
	}
	var n proto.Errno
	if errors.As(err, &n) {
		return n
	}
	if errors.Is(err, ErrNotFast) {
		return proto.ENOTSUP
	}
	var s syscall.Errno
	if errors.As(err, &s) {
		switch s {
		case syscall.EPERM, syscall.EACCES, syscall.EROFS:
			return proto.EPERM
		case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
			return proto.ENOSPC
		case syscall.ENOMEM:
			return proto.ENOMEM
		case syscall.EINVAL:
			return proto.EINVAL
		case syscall.EOPNOTSUPP:
			return proto.ENOTSUP
		}
	}
	return proto.EIO
}

// offsetOf returns where an error happened, or def.
func offsetOf(err error, def int64) int64 {
	var oe *OffsetError
	if errors.As(err, &oe) {
		return oe.Offset
	}
	return def
}

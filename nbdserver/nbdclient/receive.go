package nbdclient

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/nbdserver/proto"
)

// errProtocol marks what a server must not send.
var errProtocol = errors.New("server broke the protocol")

// chunkHeader is a reply's fixed part in any style.
type chunkHeader struct {
	flags, typ uint16
	cookie     uint64
	length     uint64
}

// readReplies handles replies until an error.
func (e *Export) readReplies() error {
	for {
		var h [proto.ExtendedReplyHeaderSize]byte
		if _, err := io.ReadFull(e.c.br, h[:4]); err != nil {
			return err
		}
		magic := binary.BigEndian.Uint32(h[:])
		var err error
		switch {
		case magic == proto.MagicSimpleReply && e.Headers != Extended:
			err = e.simpleReply(h[:proto.SimpleReplySize])
		case magic == proto.MagicStructuredReply && e.Headers == Structured:
			err = e.chunk(h[:proto.StructuredReplyHeaderSize])
		case magic == proto.MagicExtendedReply && e.Headers == Extended:
			err = e.chunk(h[:])
		default:
			err = fmt.Errorf("%w: reply magic %#x with %s headers", errProtocol, magic, e.Headers)
		}
		if err != nil {
			return err
		}
	}
}

// find returns the request a reply belongs to.
func (e *Export) find(cookie uint64) (*call, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	k := e.pending[cookie]
	if k == nil {
		return nil, fmt.Errorf("%w: reply to a request that was not sent", errProtocol)
	}
	return k, nil
}

func (e *Export) finish(cookie uint64, k *call) {
	e.mu.Lock()
	delete(e.pending, cookie)
	e.mu.Unlock()
	close(k.done)
}

func (e *Export) simpleReply(h []byte) error {
	if _, err := io.ReadFull(e.c.br, h[4:]); err != nil {
		return err
	}
	cookie := binary.BigEndian.Uint64(h[8:])
	k, err := e.find(cookie)
	if err != nil {
		return err
	}
	if errno := proto.Errno(binary.BigEndian.Uint32(h[4:])); errno != 0 {
		k.err = &RequestError{Errno: errno, Offset: -1}
	} else if k.cmd == proto.CmdBlockStatus || k.cmd == proto.CmdRead && e.Headers != Simple {
		return fmt.Errorf("%w: simple reply to a %s", errProtocol, k.cmd)
	} else if k.cmd == proto.CmdRead {
		if _, err := io.ReadFull(e.c.br, k.buf); err != nil {
			return err
		}
	}
	e.finish(cookie, k)
	return nil
}

func (e *Export) chunk(h []byte) error {
	if _, err := io.ReadFull(e.c.br, h[4:]); err != nil {
		return err
	}
	ch := chunkHeader{
		flags:  binary.BigEndian.Uint16(h[4:]),
		typ:    binary.BigEndian.Uint16(h[6:]),
		cookie: binary.BigEndian.Uint64(h[8:]),
	}
	if e.Headers == Extended {
		ch.length = binary.BigEndian.Uint64(h[24:])
	} else {
		ch.length = uint64(binary.BigEndian.Uint32(h[16:]))
	}
	k, err := e.find(ch.cookie)
	if err != nil {
		return err
	}
	if e.Headers == Extended && binary.BigEndian.Uint64(h[16:]) != k.offset {
		return fmt.Errorf("%w: extended reply to offset %d, asked at %d", errProtocol, binary.BigEndian.Uint64(h[16:]), k.offset)
	}
	if err := e.body(k, ch); err != nil {
		return err
	}
	if ch.flags&proto.ReplyFlagDone == 0 {
		if ch.typ == proto.ChunkNone {
			return fmt.Errorf("%w: an empty chunk that is not the last", errProtocol)
		}
		return nil
	}
	if k.err == nil && k.cmd == proto.CmdRead && k.covered != len(k.buf) {
		return fmt.Errorf("%w: %d of %d bytes read without an error", errProtocol, k.covered, len(k.buf))
	}
	if k.err == nil && k.cmd == proto.CmdBlockStatus && len(k.extents) == 0 {
		return fmt.Errorf("%w: block status without extents", errProtocol)
	}
	e.finish(ch.cookie, k)
	return nil
}

// body reads a chunk's payload into the request it answers.
func (e *Export) body(k *call, ch chunkHeader) error {
	switch {
	case ch.typ == proto.ChunkNone && ch.length == 0:
		return nil
	case ch.typ == proto.ChunkOffsetData && k.cmd == proto.CmdRead && ch.length > 8:
		p, err := e.place(k, ch.length-8, false)
		if err != nil {
			return err
		}
		_, err = io.ReadFull(e.c.br, p)
		return err
	case ch.typ == proto.ChunkOffsetHole && k.cmd == proto.CmdRead && ch.length == 12:
		p, err := e.place(k, 0, true)
		clear(p)
		return err
	case (ch.typ == proto.ChunkBlockStatus && e.Headers == Structured ||
		ch.typ == proto.ChunkBlockStatusExt && e.Headers == Extended) && k.cmd == proto.CmdBlockStatus:
		return e.status(k, ch)
	case ch.typ >= 1<<15:
		return e.errorBody(k, ch)
	}
	return fmt.Errorf("%w: chunk type %d of %d bytes in reply to a %s", errProtocol, ch.typ, ch.length, k.cmd)
}

// place reads where a content chunk belongs and returns that part of the
// request's buffer. A hole's length follows its offset.
func (e *Export) place(k *call, n uint64, hole bool) ([]byte, error) {
	var b [12]byte
	h := b[:8]
	if hole {
		h = b[:12]
	}
	if _, err := io.ReadFull(e.c.br, h); err != nil {
		return nil, err
	}
	off := binary.BigEndian.Uint64(h)
	if hole {
		n = uint64(binary.BigEndian.Uint32(h[8:]))
	}
	size := uint64(len(k.buf))
	if off < k.offset || off-k.offset > size || n > size-(off-k.offset) || n == 0 {
		return nil, fmt.Errorf("%w: content at %d+%d for a read of %d+%d", errProtocol, off, n, k.offset, size)
	}
	for _, c := range k.chunks {
		if int64(off) < c.Offset+c.Length && c.Offset < int64(off+n) {
			return nil, fmt.Errorf("%w: content chunks overlap", errProtocol)
		}
	}
	k.chunks = append(k.chunks, Chunk{Offset: int64(off), Length: int64(n), Hole: hole})
	k.covered += int(n)
	return k.buf[off-k.offset:][:n], nil
}

// status reads the extents of one context.
func (e *Export) status(k *call, ch chunkHeader) error {
	head, each := uint64(4), uint64(8)
	if e.Headers == Extended {
		head, each = 8, 16
	}
	if ch.length < head+each || (ch.length-head)%each != 0 || ch.length > head+each*proto.MaxExtents {
		return fmt.Errorf("%w: block status of %d bytes", errProtocol, ch.length)
	}
	b := make([]byte, ch.length)
	if _, err := io.ReadFull(e.c.br, b); err != nil {
		return err
	}
	name, ok := e.Contexts[binary.BigEndian.Uint32(b)]
	if !ok || k.extents[name] != nil {
		return fmt.Errorf("%w: block status of a context not asked for, or twice", errProtocol)
	}
	if head == 8 && uint64(binary.BigEndian.Uint32(b[4:])) != (ch.length-head)/each {
		return fmt.Errorf("%w: block status miscounts its extents", errProtocol)
	}
	xs := make([]Extent, 0, (ch.length-head)/each)
	for b = b[head:]; len(b) > 0; b = b[each:] {
		var n, flags uint64
		if each == 16 {
			n, flags = binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
		} else {
			n, flags = uint64(binary.BigEndian.Uint32(b)), uint64(binary.BigEndian.Uint32(b[4:]))
		}
		if n == 0 || n > 1<<62 {
			return fmt.Errorf("%w: extent of %d bytes", errProtocol, n)
		}
		xs = append(xs, Extent{Length: int64(n), Flags: flags})
	}
	k.extents[name] = xs
	return nil
}

// errorBody reads an error chunk.
func (e *Export) errorBody(k *call, ch chunkHeader) error {
	if ch.length < 6 || ch.length > 6+8+proto.MaxString {
		return fmt.Errorf("%w: error chunk of %d bytes", errProtocol, ch.length)
	}
	b := make([]byte, ch.length)
	if _, err := io.ReadFull(e.c.br, b); err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint16(b[4:]))
	if n > len(b)-6 {
		return fmt.Errorf("%w: error text longer than its chunk", errProtocol)
	}
	re := &RequestError{Errno: proto.Errno(binary.BigEndian.Uint32(b)), Text: string(b[6 : 6+n]), Offset: -1}
	if ch.typ == proto.ChunkErrorOffset {
		if len(b) < 6+n+8 {
			return fmt.Errorf("%w: error without its offset", errProtocol)
		}
		re.Offset = int64(binary.BigEndian.Uint64(b[6+n:]))
	}
	if re.Errno == 0 {
		return fmt.Errorf("%w: error chunk without an error", errProtocol)
	}
	if k.err == nil {
		k.err = re
	}
	return nil
}

package nbdclient

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/varve-io/varve/nbdserver/proto"
)

// Export is a connection in transmission. Its methods may be called from many
// goroutines at once; their requests share the connection.
type Export struct {
	Info
	Headers Headers
	// Contexts are the metadata contexts selected, by their IDs.
	Contexts map[uint32]string

	c     *Client
	write sync.Mutex

	mu      sync.Mutex
	pending map[uint64]*call
	cookie  uint64
	err     error // why the connection is of no more use
	done    chan struct{}
}

// RequestError is an error a server answered a request with.
type RequestError struct {
	Errno  proto.Errno
	Text   string // the server's own words, if any
	Offset int64  // where it happened, or -1
}

// Error gives number, words and place.
func (e *RequestError) Error() string {
	s := e.Errno.Error()
	if e.Text != "" {
		s += ": " + e.Text
	}
	if e.Offset >= 0 {
		s += fmt.Sprintf(" (at offset %d)", e.Offset)
	}
	return s
}

// Unwrap returns the error number.
func (e *RequestError) Unwrap() error { return e.Errno }

// Chunk is a content chunk of a read, as the server sent it.
type Chunk struct {
	Offset int64
	Length int64
	Hole   bool
}

// Extent is a run of bytes with the flags of one metadata context.
type Extent struct {
	Length int64  `json:"length"`
	Flags  uint64 `json:"flags"`
}

type call struct {
	cmd     proto.Command
	offset  uint64
	length  uint64
	buf     []byte
	covered int
	chunks  []Chunk
	extents map[string][]Extent
	err     error
	done    chan struct{}
}

func newExport(c *Client, in Info) *Export {
	e := &Export{Info: in, Headers: c.headers, Contexts: c.contexts, c: c, pending: map[uint64]*call{}, done: make(chan struct{})}
	go func() {
		defer close(e.done)
		e.receive()
	}()
	return e
}

// Close says goodbye and ends the connection.
func (e *Export) Close() error {
	_ = e.send(proto.CmdDisconnect, 0, 0, 0, 0, nil)
	err := e.c.conn.Close()
	<-e.done
	if errors.Is(err, net.ErrClosed) { // the server was faster
		return nil
	}
	return err
}

// send writes one request.
func (e *Export) send(cmd proto.Command, flags uint16, cookie, off, length uint64, payload []byte) error {
	b := make([]byte, 0, proto.ExtendedRequestSize)
	if e.Headers == Extended {
		if payload != nil {
			flags |= proto.CmdFlagPayloadLen
			length = uint64(len(payload))
		}
		b = binary.BigEndian.AppendUint32(b, proto.MagicExtendedRequest)
	} else {
		if length > 1<<32-1 {
			return fmt.Errorf("%s of %d bytes needs extended headers", cmd, length)
		}
		b = binary.BigEndian.AppendUint32(b, proto.MagicRequest)
	}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, uint16(cmd))
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	if e.Headers == Extended {
		b = binary.BigEndian.AppendUint64(b, length)
	} else {
		b = binary.BigEndian.AppendUint32(b, uint32(length))
	}
	e.write.Lock()
	defer e.write.Unlock()
	if _, err := e.c.conn.Write(b); err != nil {
		return err
	}
	if len(payload) == 0 {
		return nil
	}
	_, err := e.c.conn.Write(payload)
	return err
}

// do sends a request and waits for its answer.
func (e *Export) do(ctx context.Context, k *call, flags uint16, payload []byte) error {
	k.done = make(chan struct{})
	e.mu.Lock()
	if e.err != nil {
		defer e.mu.Unlock()
		return e.err
	}
	e.cookie++
	cookie := e.cookie
	e.pending[cookie] = k
	e.mu.Unlock()
	if err := e.send(k.cmd, flags, cookie, k.offset, k.length, payload); err != nil {
		e.mu.Lock()
		delete(e.pending, cookie)
		e.mu.Unlock()
		return err
	}
	select {
	case <-k.done:
		return k.err
	case <-ctx.Done():
		// The buffer is still the receiver's: the connection has to go.
		_ = e.c.conn.Close()
		<-k.done
		return ctx.Err()
	}
}

// ReadAt fills p from off.
func (e *Export) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	_, err := e.ReadChunks(ctx, p, off, 0)
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// ReadChunks fills p from off, with the given command flags, and returns how
// the server split it: nothing with simple replies.
func (e *Export) ReadChunks(ctx context.Context, p []byte, off int64, flags uint16) ([]Chunk, error) {
	k := &call{cmd: proto.CmdRead, offset: uint64(off), length: uint64(len(p)), buf: p}
	err := e.do(ctx, k, flags, nil)
	return k.chunks, err
}

// WriteAt writes p at off.
func (e *Export) WriteAt(ctx context.Context, p []byte, off int64, flags uint16) error {
	if p == nil {
		p = []byte{}
	}
	return e.do(ctx, &call{cmd: proto.CmdWrite, offset: uint64(off), length: uint64(len(p))}, flags, p)
}

// Command sends a command without payload and data: flush, trim, zero, cache.
func (e *Export) Command(ctx context.Context, cmd proto.Command, off, length int64, flags uint16) error {
	return e.do(ctx, &call{cmd: cmd, offset: uint64(off), length: uint64(length)}, flags, nil)
}

// BlockStatus asks for the extents of a range in every selected context, by
// name. The server may report less than requested, but at least one each.
func (e *Export) BlockStatus(ctx context.Context, off, length int64, flags uint16) (map[string][]Extent, error) {
	k := &call{cmd: proto.CmdBlockStatus, offset: uint64(off), length: uint64(length), extents: map[string][]Extent{}}
	err := e.do(ctx, k, flags, nil)
	return k.extents, err
}

// BlockStatusOf is BlockStatus for some of the selected contexts only, given
// by ID; it needs extended headers and FlagBlockStatusPayload.
func (e *Export) BlockStatusOf(ctx context.Context, off, length int64, ids ...uint32) (map[string][]Extent, error) {
	if e.Headers != Extended {
		return nil, errors.New("choosing metadata contexts needs extended headers")
	}
	payload := binary.BigEndian.AppendUint64(nil, uint64(length))
	for _, id := range ids {
		payload = binary.BigEndian.AppendUint32(payload, id)
	}
	k := &call{cmd: proto.CmdBlockStatus, offset: uint64(off), length: uint64(length), extents: map[string][]Extent{}}
	err := e.do(ctx, k, 0, payload)
	return k.extents, err
}

// Map calls yield for the extents of a context over a range, asking as often
// as needed, neighbours with equal flags merged.
func (e *Export) Map(ctx context.Context, name string, off, length int64, yield func(off int64, x Extent) bool) error {
	var have Extent
	start := off
	for end := off + length; off < end; {
		ask := end - off
		if e.Headers != Extended {
			ask = min(ask, 1<<32-1<<16)
		}
		all, err := e.BlockStatus(ctx, off, ask, 0)
		if err != nil {
			return err
		}
		if len(all[name]) == 0 {
			return fmt.Errorf("server does not report metadata context %q", name)
		}
		for _, x := range all[name] {
			x.Length = min(x.Length, end-off)
			off += x.Length
			if have.Length > 0 && have.Flags == x.Flags {
				have.Length += x.Length
				continue
			}
			if have.Length > 0 && !yield(start, have) {
				return nil
			}
			start, have = off-x.Length, x
		}
	}
	if have.Length > 0 {
		yield(start, have)
	}
	return nil
}

// receive reads replies until the connection ends.
func (e *Export) receive() {
	err := e.readReplies()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.err = fmt.Errorf("NBD connection lost: %w", err)
	_ = e.c.conn.Close()
	for cookie, k := range e.pending {
		delete(e.pending, cookie)
		k.err = e.err
		close(k.done)
	}
}

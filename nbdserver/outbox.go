package nbdserver

import (
	"bufio"
	"net"
	"sync"
	"syscall"
	"time"
)

// maxReplyHeader is the longest fixed part of a reply: an extended header and
// an OFFSET_HOLE chunk.
const maxReplyHeader = 44

// outgoing is one reply or chunk: a fixed part, perhaps data, and what to release when both
// have been handed to the kernel.
type outgoing struct {
	header  [maxReplyHeader]byte
	hlen    uint8
	data    []byte
	owner   Releaser // of data; may be nil
	granted grant
}

func (e *outgoing) size() int { return int(e.hlen) + len(e.data) }

// outbox is a connection's queue of replies. push appends replies; flush writes them. At most
// one goroutine writes at a time: a caller of flush tries once without blocking, and leaves
// what the socket does not accept to a goroutine that waits for the client.
type outbox struct {
	conn  net.Conn
	raw   syscall.RawConn // nil with TLS or a stream that has no descriptor
	bw    *bufio.Writer   // used when raw is nil
	pace  func() pace
	freed *budget
	fail  func(error) // called once, without locks, when writing fails

	mu      sync.Mutex
	idle    sync.Cond // signalled when writing becomes false
	queue   []outgoing
	writing bool
	err     error

	// Owned by the goroutine that set writing.
	batch []outgoing
	pos   int // first entry of batch not fully written
	skip  int // bytes of batch[pos] already written
	vec   vector
}

func newOutbox(nc net.Conn, pace func() pace, freed *budget, fail func(error)) *outbox {
	o := &outbox{conn: nc, pace: pace, freed: freed, fail: fail}
	o.idle.L = &o.mu
	o.raw = rawSocket(nc)
	if o.raw == nil {
		o.bw = bufio.NewWriterSize(nc, 32<<10)
	}
	return o
}

// push queues replies without writing them. After an error they are dropped.
// The entries of one call stay together.
func (o *outbox) push(entries ...outgoing) {
	o.mu.Lock()
	if o.err != nil {
		o.mu.Unlock()
		for i := range entries {
			o.finish(&entries[i])
		}
		return
	}
	o.queue = append(o.queue, entries...)
	o.mu.Unlock()
}

// flush starts writing the queue. It does not wait for a slow client.
func (o *outbox) flush() {
	o.mu.Lock()
	if o.writing || len(o.queue) == 0 {
		o.mu.Unlock()
		return
	}
	o.writing = true
	defer o.rescue()
	if o.raw == nil {
		o.mu.Unlock()
		go o.drain()
		return
	}
	for len(o.queue) > 0 {
		o.swap()
		o.mu.Unlock()
		for o.pos < len(o.batch) {
			n, err := o.writeOnce(false)
			if err != nil {
				o.broken(err)
				return
			}
			if n == 0 { // the socket is full
				go o.drain()
				return
			}
		}
		o.mu.Lock()
	}
	o.stopped()
}

// drain writes until the queue is empty, waiting for the client, which must keep its pace.
func (o *outbox) drain() {
	defer o.rescue()
	pace := o.pace()
	for {
		for o.pos < len(o.batch) {
			var err error
			if o.raw != nil {
				err = o.wait(&pace, func() (int, error) { return o.writeOnce(true) })
			} else {
				err = o.writeBuffered(&pace)
			}
			if err != nil {
				o.broken(err)
				return
			}
		}
		o.mu.Lock()
		if len(o.queue) == 0 {
			// An old deadline would fail the next write that does not wait.
			_ = o.conn.SetWriteDeadline(time.Time{})
			o.stopped()
			return
		}
		o.swap()
		o.mu.Unlock()
	}
}

// wait does one write that waits for the client.
func (o *outbox) wait(pace *pace, write func() (int, error)) error {
	began := time.Now()
	if err := o.conn.SetWriteDeadline(pace.deadline(began)); err != nil {
		return err
	}
	n, err := write()
	pace.moved(n, time.Since(began))
	return err
}

// swap makes the queue the batch. The lock is held; the old batch is done.
func (o *outbox) swap() {
	o.batch, o.queue = o.queue, o.batch[:0]
	o.pos, o.skip = 0, 0
}

// stopped ends a turn of writing and unlocks.
func (o *outbox) stopped() {
	o.writing = false
	o.batch = o.batch[:0]
	o.pos = 0
	if cap(o.batch) > 1024 { // keep little after a burst
		o.batch = nil
	}
	o.idle.Broadcast()
	o.mu.Unlock()
}

// writeOnce hands as many entries as one writev accepts to the socket and returns the bytes
// written: 0 if it would block and wait is false.
func (o *outbox) writeOnce(wait bool) (int, error) {
	o.vec.reset()
	skip := o.skip
	for i := o.pos; i < len(o.batch); i++ {
		e := &o.batch[i]
		h := e.header[:e.hlen]
		if skip < len(h) {
			o.vec.add(h[skip:])
			skip = 0
		} else {
			skip -= len(h)
		}
		if skip < len(e.data) {
			o.vec.add(e.data[skip:])
		}
		skip = 0
		if o.vec.full() {
			break
		}
	}
	n, err := o.vec.write(o.raw, wait)
	if n > 0 {
		o.advance(n)
	}
	return n, err
}

// advance releases the entries that n more bytes complete.
func (o *outbox) advance(n int) {
	n += o.skip
	for o.pos < len(o.batch) {
		e := &o.batch[o.pos]
		if n < e.size() {
			break
		}
		n -= e.size()
		o.finish(e)
		o.pos++
	}
	o.skip = n
}

// maxBuffered is the most bytes of one write without writev, so that a client's pace is
// measured in between.
const maxBuffered = 64 << 10

// writeBuffered writes one entry, and the buffer at the end of the batch.
func (o *outbox) writeBuffered(pace *pace) error {
	e := &o.batch[o.pos]
	write := func(b []byte) error {
		return o.wait(pace, func() (int, error) { return o.bw.Write(b) })
	}
	if err := write(e.header[:e.hlen]); err != nil {
		return err
	}
	for data := e.data; len(data) > 0; {
		n := min(len(data), maxBuffered)
		if err := write(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	o.finish(e)
	o.pos++
	if o.pos < len(o.batch) {
		return nil
	}
	o.mu.Lock()
	more := len(o.queue) > 0
	o.mu.Unlock()
	if more {
		return nil
	}
	return o.wait(pace, func() (int, error) { return 0, o.bw.Flush() })
}

// finish releases what an entry held.
func (o *outbox) finish(e *outgoing) {
	if e.owner != nil {
		e.owner.Release()
	}
	o.freed.release(e.granted)
	e.data, e.owner, e.granted = nil, nil, grant{}
}

// broken drops everything after a failed write.
func (o *outbox) broken(err error) {
	for ; o.pos < len(o.batch); o.pos++ {
		o.finish(&o.batch[o.pos])
	}
	o.mu.Lock()
	o.err = err
	dropped := o.queue
	o.queue = nil
	o.stopped()
	for i := range dropped {
		o.finish(&dropped[i])
	}
	o.fail(err)
}

// rescue ends writing after a panic, most likely of the export when it released what it had
// lent.
func (o *outbox) rescue() {
	p := recover()
	if p == nil {
		return
	}
	err := panicked(p)
	o.mu.Lock()
	o.err = err
	o.queue, o.batch = nil, nil // their memory is released with the connection's
	o.stopped()
	o.fail(err)
}

// sending reports whether replies are still to be written.
func (o *outbox) sending() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.writing || len(o.queue) > 0
}

// close writes what is left and waits for it.
func (o *outbox) close() {
	o.flush()
	o.mu.Lock()
	for o.writing {
		o.idle.Wait()
	}
	o.mu.Unlock()
}

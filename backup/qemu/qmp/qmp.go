// Package qmp speaks with a running QEMU: QMP with its monitor (docs/interop/qmp-spec), and
// the same JSON with the agent in its guest. It knows no commands.
//
// The other side is not trusted: answers are bounded, and the agent's come from a guest.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/plain"
)

// Errors that callers decide by.
var (
	// ErrBusy means that the monitor did not greet: it serves one client at a time.
	ErrBusy = errors.New("the monitor does not answer: it serves one client at a time, and another one is connected; give Varve a monitor of its own, or end that client")
	// ErrLost means that the connection ended, or an answer did not come in time. Each later
	// command fails with it too.
	ErrLost = errors.New("the connection to QEMU is lost")
)

// Error is a command's own failure, as the other side reports it.
type Error struct {
	Command, Class, Text string
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Command, e.Text) }

// NoCommand reports whether err means that the other side does not have the command.
func NoCommand(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Class == "CommandNotFound"
}

// Bounds.
const (
	// maxMessage is the longest message that is read, in bytes: the nodes of a machine with
	// hundreds of disks are about 1 MiB.
	maxMessage = 32 << 20
	maxText    = 1 << 10
	greeting   = 5 * time.Second  // how long a monitor may take to greet
	answering  = 60 * time.Second // how long a command may take: one that drains a slow disk waits for it
)

// Conn is a connection. Commands are sent one at a time; Do may be called concurrently.
type Conn struct {
	conn     net.Conn
	uid, gid int // of the process at the other end

	mu     sync.Mutex
	r      *bufio.Reader
	in     *messages // from r
	id     int64
	broken error
}

// Dial connects to the monitor at a unix socket.
func Dial(ctx context.Context, socket string) (*Conn, error) {
	c, err := dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	if err := c.greet(); err != nil {
		_ = c.conn.Close()
		return nil, fmt.Errorf("%s: %w", socket, err)
	}
	return c, nil
}

func dial(ctx context.Context, socket string) (*Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to QEMU: %w", err)
	}
	c := &Conn{conn: conn, r: bufio.NewReaderSize(conn, 64<<10), uid: -1, gid: -1}
	c.in = newMessages(c.r)
	if raw, err := conn.(*net.UnixConn).SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				c.uid, c.gid = int(cred.Uid), int(cred.Gid)
			}
		})
	}
	return c, nil
}

// Owner is the user and group of the process that listens; -1 if that is not known.
func (c *Conn) Owner() (uid, gid int) { return c.uid, c.gid }

func (c *Conn) greet() error {
	_ = c.conn.SetDeadline(time.Now().Add(greeting))
	m, err := c.in.next()
	var timeout net.Error
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return ErrBusy
	case err != nil:
		return err
	case m.Greeting == nil:
		return errors.New("it does not greet as a monitor of QEMU does (QMP)")
	}
	return c.Do(context.Background(), "qmp_capabilities", nil, nil)
}

// Do runs a command and decodes its answer, unless answer is nil. A command that was sent is
// waited for, whatever becomes of ctx: what it did has to be known. Errors: *Error, ErrLost.
func (c *Conn) Do(ctx context.Context, command string, arguments, answer any) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return c.broken
	}
	c.id++
	b, err := json.Marshal(request{command, arguments, c.id})
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	_ = c.conn.SetDeadline(time.Now().Add(answering))
	if _, err := c.conn.Write(append(b, '\n')); err != nil {
		return c.lose(command, err)
	}
	for {
		m, err := c.in.next()
		if err != nil {
			return c.lose(command, err)
		}
		switch {
		case m.ID == nil || *m.ID != c.id: // an event, or an answer to a client before us
			continue
		case m.Error != nil:
			return &Error{command, plain.Clip(m.Error.Class, 64), plain.Clip(m.Error.Desc, maxText)}
		case answer == nil:
			return nil
		}
		if err := json.Unmarshal(m.Return, answer); err != nil {
			return fmt.Errorf("%s: read the answer: %w", command, err)
		}
		return nil
	}
}

func (c *Conn) lose(command string, err error) error {
	c.broken = fmt.Errorf("%w: %s: %w", ErrLost, command, err)
	_ = c.conn.Close()
	return c.broken
}

// Close ends the connection.
func (c *Conn) Close() error { return c.conn.Close() }

type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        int64  `json:"id"`
}

// message is whatever comes: a greeting, an answer or an event.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	ID *int64 `json:"id"`
}

// messages reads the values that follow each other on a connection, whether on one line each
// or on several (a monitor with pretty=on).
type messages struct {
	r    io.Reader
	dec  *json.Decoder
	room int // bytes that may still be read for this message
}

func newMessages(r io.Reader) *messages {
	m := &messages{r: r}
	m.dec = json.NewDecoder(m)
	return m
}

// Read bounds what a message may take.
func (m *messages) Read(p []byte) (int, error) {
	if m.room <= 0 {
		return 0, fmt.Errorf("a message is longer than %d bytes", maxMessage)
	}
	n, err := m.r.Read(p[:min(len(p), m.room)])
	m.room -= n
	return n, err
}

func (m *messages) next() (*message, error) {
	m.room = maxMessage
	var out message
	if err := m.dec.Decode(&out); err != nil {
		return nil, fmt.Errorf("read a message: %w", err)
	}
	return &out, nil
}

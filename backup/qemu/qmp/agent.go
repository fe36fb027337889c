package qmp

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// ErrNoAgent means that no agent answers in the guest.
var ErrNoAgent = errors.New("the guest agent does not answer; install and start qemu-guest-agent in the guest, or back up without --freeze")

// DialAgent connects to the guest agent behind a unix socket: the other end of the virtio-serial
// port org.qemu.guest_agent.0. What an earlier client left unread is skipped (QEMU,
// qga/qapi-schema.json, guest-sync-delimited).
func DialAgent(ctx context.Context, socket string) (*Conn, error) {
	c, err := dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	if err := c.sync(); err != nil {
		_ = c.conn.Close()
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			err = ErrNoAgent
		}
		return nil, fmt.Errorf("%s: %w", socket, err)
	}
	return c, nil
}

// delimiter is no byte of any UTF-8: the agent drops what it had of a broken message, and
// sends one before its answer.
const delimiter = 0xff

// maxStale bounds what is skipped, in bytes.
const maxStale = 1 << 20

func (c *Conn) sync() error {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	token := int64(binary.LittleEndian.Uint64(b[:]) >> 16)
	_ = c.conn.SetDeadline(time.Now().Add(greeting))
	ask, err := json.Marshal(map[string]any{"execute": "guest-sync-delimited", "arguments": map[string]any{"id": token}})
	if err != nil {
		return err
	}
	if _, err := c.conn.Write(append(append([]byte{delimiter}, ask...), '\n')); err != nil {
		return err
	}
	for skipped := 0; ; skipped++ {
		one, err := c.r.ReadByte()
		if err != nil {
			return err
		}
		if skipped > maxStale {
			return fmt.Errorf("the guest agent sent more than %d bytes without an answer", maxStale)
		}
		if one != delimiter {
			continue
		}
		line, err := c.r.ReadSlice('\n') // an answer has one line
		if err != nil {
			return err
		}
		skipped += len(line)
		var m message
		if json.Unmarshal(line, &m) != nil {
			continue
		}
		var got int64
		if m.Error == nil && json.Unmarshal(m.Return, &got) == nil && got == token {
			return nil
		}
	}
}

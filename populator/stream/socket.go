package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// A mover listens on a Unix socket in its pod, and a second process in the pod, which the
// controller runs by an exec, connects that with its standard streams. So a mover is reached
// without a port, a key or a network policy: the API server authorises access.

// Relayed is the command that the controller runs in a mover's container: the mover is its first
// process.
var Relayed = []string{"/proc/1/exe", "mover", "relay"}

// hello is what a mover writes once it accepts a stream.
const hello = "varve stream 1\n"

// connectPatience is how long a relay waits for the mover to listen: it opens the repository first.
const connectPatience = 5 * time.Minute

// streamSilence is how long a mover waits for the next byte, or beat, of a stream: the controller may
// have been killed, or the kubelet, which leaves the relay running.
const streamSilence = 2 * time.Minute

// live is a connection with a time limit for each read.
type live struct{ net.Conn }

func (l live) Read(p []byte) (int, error) {
	if err := l.SetReadDeadline(time.Now().Add(streamSilence)); err != nil {
		return 0, err
	}
	return l.Conn.Read(p)
}

// CloseWrite is the end of what is written, for the peer.
func (l live) CloseWrite() error { return l.Conn.(*net.UnixConn).CloseWrite() }

// Accept waits on a socket for one stream, for as long as patience, and writes hello. A read of
// the stream fails if nothing arrives for two minutes.
func Accept(ctx context.Context, socket string, patience time.Duration) (net.Conn, error) {
	_ = os.Remove(socket)
	l, err := new(net.ListenConfig).Listen(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("listen for the stream: %w", err)
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	if err := l.(*net.UnixListener).SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, fmt.Errorf("listen for the stream: %w", err)
	}
	c, err := l.Accept()
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("no stream came within %v: %w", patience, err)
	}
	if _, err := io.WriteString(c, hello); err != nil {
		return nil, errors.Join(fmt.Errorf("take the stream: %w", err), c.Close())
	}
	return live{c}, nil
}

// Relay connects a mover's socket with the streams of a process, until the mover has closed it.
// The end of in does not end it: Reader reports that as a cut, and the mover ends.
func Relay(ctx context.Context, socket string, in io.Reader, out io.Writer) error {
	c, err := dial(ctx, socket)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	go func() {
		_, _ = io.Copy(c, in) // the mover detects missing bytes
		_ = c.(*net.UnixConn).CloseWrite()
	}()
	if _, err := io.Copy(out, c); err != nil {
		return fmt.Errorf("the mover's answer: %w", err)
	}
	return nil
}

// dial waits for the mover to listen.
func dial(ctx context.Context, socket string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectPatience)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if err == nil {
			return c, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("the mover does not listen: %w", err)
		}
	}
}

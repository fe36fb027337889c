package libvirt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/varve-io/varve/internal/plain"
	"github.com/varve-io/varve/internal/process"
	"github.com/varve-io/varve/internal/tempdir"
)

// tunnel is the user's own ssh, which forwards sockets of another machine: its configuration,
// known hosts and agent are in force. It ends with this process.
type tunnel struct {
	dir   *tempdir.Dir
	cmd   *exec.Cmd
	ended chan struct{}
	text  bytes.Buffer // what it printed; after ended
	ports []string     // the sockets on this machine
	free  atomic.Int64 // what its command last said of the room there, in bytes; below 0 if nothing
}

// opening is how long ssh may take to connect.
const opening = 30 * time.Second

// openTunnel forwards libvirt's sockets, and nbd if it is not empty; and watches the room in the
// directory dir of the other machine, unless it is empty. A user there who may forward and nothing
// else is forwarded only.
func openTunnel(ctx context.Context, u *URI, nbd, dir string) (*tunnel, error) {
	t, err := startTunnel(ctx, u, nbd, dir)
	if err != nil && dir != "" && ctx.Err() == nil {
		return startTunnel(ctx, u, nbd, "")
	}
	return t, err
}

func startTunnel(ctx context.Context, u *URI, nbd, watched string) (_ *tunnel, err error) {
	program, err := exec.LookPath("ssh")
	if err != nil {
		return nil, fmt.Errorf("libvirt+ssh needs the program ssh: %w", err)
	}
	t := &tunnel{ended: make(chan struct{})}
	if t.dir, err = tempdir.Make("/tmp", "varve-tunnel-"); err != nil { // short, as a socket's path must be
		return nil, err
	}
	t.free.Store(-1)
	args := append(sshArgs(u), "-o", "ExitOnForwardFailure=yes")
	remote := u.sockets()
	if nbd != "" {
		remote = append(remote, nbd)
	}
	for i, r := range remote {
		local := filepath.Join(t.dir.Path(), fmt.Sprint(i))
		t.ports = append(t.ports, local)
		args = append(args, "-L", local+":"+r)
	}
	if nbd == "" {
		t.ports = append(t.ports, "")
	}
	if watched == "" {
		t.cmd = exec.Command(program, append(args, "-N", "--", u.Host)...)
	} else {
		t.cmd = exec.Command(program, append(args, "--", u.Host, watchCommand(watched))...)
		t.cmd.Stdout = &roomFeed{t: t}
	}
	t.cmd.Stderr = &t.text
	if err := process.StartTied(t.cmd, syscall.SIGTERM, func(error) { close(t.ended) }); err != nil {
		return nil, errors.Join(err, t.dir.Close())
	}
	deadline := time.After(opening)
	for {
		if _, err := os.Lstat(t.ports[len(remote)-1]); err == nil { // the last that ssh makes
			return t, nil
		}
		select {
		case <-t.ended:
			return nil, errors.Join(fmt.Errorf("ssh to %s: %s", u.Host, strings.TrimSpace(t.text.String())), t.close())
		case <-deadline:
			return nil, errors.Join(fmt.Errorf("ssh to %s: no connection within %s", u.Host, opening), t.close())
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), t.close())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// sshArgs are those of each ssh.
func sshArgs(u *URI) []string {
	args := []string{"-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ControlPath=none"}
	if u.Port != "" {
		args = append(args, "-p", u.Port)
	}
	if u.User != "" {
		args = append(args, "-l", u.User)
	}
	return args
}

// ReadFile reads a plain file of the other machine, of most bytes at most, over ssh.
func (c *Conn) ReadFile(ctx context.Context, u *URI, path string, most int64) ([]byte, error) {
	program, err := exec.LookPath("ssh")
	if err != nil {
		return nil, fmt.Errorf("libvirt+ssh needs the program ssh: %w", err)
	}
	cmd := exec.CommandContext(ctx, program, append(sshArgs(u), "--", u.Host, readCommand(path, most+1))...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(out, most+1))
	_, _ = io.Copy(io.Discard, out)
	switch ended := cmd.Wait(); {
	case ended != nil:
		return nil, fmt.Errorf("read %s of %s: %w: %s", path, u.Host, ended, plain.Clip(strings.TrimSpace(said.String()), 500))
	case err == nil && int64(len(b)) > most:
		return nil, fmt.Errorf("%s of %s is larger than %d bytes", path, u.Host, most)
	}
	return b, err
}

// readCommand prints so many bytes of a plain file.
func readCommand(path string, n int64) string {
	return fmt.Sprintf("test -f %[1]s && exec head -c %[2]d -- %[1]s", quote(path), n)
}

// quote is a word for a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// watchCommand prints free blocks and their size for as long as it is read.
func watchCommand(dir string) string {
	return "while stat -f -c '%a %S' -- " + quote(dir) + "; do sleep 0.2; done"
}

// roomFeed takes what watchCommand prints.
type roomFeed struct {
	t    *tunnel
	line []byte
}

func (f *roomFeed) Write(p []byte) (int, error) {
	for _, b := range p {
		if b != '\n' {
			if len(f.line) < 64 {
				f.line = append(f.line, b)
			}
			continue
		}
		var blocks, size int64
		if n, _ := fmt.Sscanf(string(f.line), "%d %d", &blocks, &size); n == 2 && blocks >= 0 && size > 0 && blocks < math.MaxInt64/size {
			f.t.free.Store(blocks * size)
		}
		f.line = f.line[:0]
	}
	return len(p), nil
}

// dial connects to the first of libvirt's sockets that answers. ssh accepts a connection before
// it knows whether the other end does, and closes it then.
func (t *tunnel) dial(ctx context.Context) (net.Conn, error) {
	for _, port := range t.ports[:len(t.ports)-1] {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", port)
		if err != nil {
			return nil, err
		}
		// libvirt waits for its client to speak first.
		_ = conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		var one [1]byte
		_, err = conn.Read(one[:])
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			return conn, conn.SetReadDeadline(time.Time{})
		}
		_ = conn.Close()
	}
	return nil, errors.New("libvirt does not answer there; is the user allowed to use its socket?")
}

func (t *tunnel) nbd() string {
	if t == nil {
		return ""
	}
	return t.ports[len(t.ports)-1]
}

func (t *tunnel) close() error {
	if t == nil {
		return nil
	}
	if t.cmd != nil && t.cmd.Process != nil {
		_ = t.cmd.Process.Signal(syscall.SIGTERM)
		<-t.ended
	}
	return t.dir.Close()
}

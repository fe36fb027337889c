package libvirt

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/varve-io/varve/internal/plain"
	"github.com/varve-io/varve/internal/process"
	"github.com/varve-io/varve/internal/tempdir"
)

// Command prepares a program to run in a folder of the URI's machine, over ssh.
func (u *URI) Command(ctx context.Context, dir string, argv ...string) (*exec.Cmd, error) {
	return u.shell(ctx, nil, "cd "+quote(dir)+" && exec env LC_ALL=C "+quoteAll(argv))
}

// shell prepares a script of a POSIX shell to run there.
func (u *URI) shell(ctx context.Context, options []string, script string) (*exec.Cmd, error) {
	if u.Transport != "ssh" {
		return nil, errors.New("programs of another machine run over ssh only: use libvirt+ssh://")
	}
	program, err := exec.LookPath("ssh")
	if err != nil {
		return nil, fmt.Errorf("libvirt+ssh needs the program ssh: %w", err)
	}
	return exec.CommandContext(ctx, program, append(append(sshArgs(u), options...), "--", u.Host, "exec sh -c "+quote(script))...), nil
}

func quoteAll(argv []string) string {
	quoted := make([]string, len(argv))
	for i, a := range argv {
		quoted[i] = quote(a)
	}
	return strings.Join(quoted, " ")
}

// Listener is a program of another machine that listens on a socket, which ssh forwards. It is killed with this process,
// however that ends, and if the connection to it does.
type Listener struct {
	dir   *tempdir.Dir
	cmd   *exec.Cmd
	stdin io.Closer
	ended chan struct{}
	text  bytes.Buffer // what it printed; after ended
}

// listenScript runs a program until its standard input ends, or has no line for some seconds: a connection may be lost
// without a word. All are of one process group, the shell's own, which sshd makes. The program may be about to make its
// socket in the folder that goes: the second removal is of that.
const listenScript = `umask 077
read -r pid name state parent group rest </proc/$$/stat
[ "$group" = $$ ] || { echo "the shell of this host has no process group of its own" >&2; exit 1; }
mkdir %[1]s || exit
trap 'rm -rf %[1]s || rm -rf %[1]s; kill -9 0' EXIT
trap 'exit 1' HUP INT TERM PIPE
{ cd %[2]s && env LC_ALL=C %[3]s; : >%[1]s/ended; } </dev/null >/dev/null &
: >%[1]s/beat
{ while sleep %[4]d && rm %[1]s/beat; do :; done; rm -rf %[1]s || rm -rf %[1]s; kill -9 0; } </dev/null >/dev/null 2>&1 &
tries=0
until [ -S %[1]s/s ]; do
	[ ! -e %[1]s/ended ] && [ $tries -lt 300 ] || exit 1
	tries=$((tries + 1))
	sleep 0.1 || sleep 1
done
echo ready
while read -r line; do : >%[1]s/beat; done`

// beatPause is the time between two lines to listenScript, which waits at least silence seconds for one.
const (
	beatPause = 5 * time.Second
	silence   = 60
)

// ending is how long the program's end is waited for. It has an image open, which is changed next.
const ending = 10 * time.Second

// Listen starts, in a folder there, the program that argv makes listen on a socket.
func (u *URI) Listen(ctx context.Context, dir string, argv func(socket string) []string) (_ *Listener, err error) {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	there := "/tmp/varve-nbd-" + hex.EncodeToString(id[:])
	l := &Listener{ended: make(chan struct{})}
	if l.dir, err = tempdir.Make("/tmp", "varve-tunnel-"); err != nil { // short, as a socket's path must be
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	// Not bound to ctx: it is ended by Close.
	l.cmd, err = u.shell(context.WithoutCancel(ctx), []string{"-o", "ExitOnForwardFailure=yes", "-L", l.Socket() + ":" + there + "/s"},
		fmt.Sprintf(listenScript, there, quote(dir), quoteAll(argv(there+"/s")), silence))
	if err != nil {
		return nil, err
	}
	l.cmd.Stderr = &l.text
	ready := readyFeed{ready: make(chan struct{})}
	l.cmd.Stdout = &ready
	stdin, err := l.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := process.StartTied(l.cmd, syscall.SIGTERM, func(error) { close(l.ended) }); err != nil {
		return nil, err
	}
	l.stdin = stdin
	go l.beat(stdin)
	select {
	case <-ready.ready:
		return l, nil
	case <-l.ended:
		return nil, l.Err()
	case <-time.After(opening):
		return nil, fmt.Errorf("ssh to %s: nothing listens within %s", u.Host, opening)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// beat tells the other end that this one is there, until the program ends or its input is closed.
func (l *Listener) beat(to io.Writer) {
	for {
		select {
		case <-l.ended:
			return
		case <-time.After(beatPause):
			if _, err := io.WriteString(to, "\n"); err != nil {
				return
			}
		}
	}
}

// readyFeed waits for the line "ready".
type readyFeed struct {
	ready chan struct{}
	text  []byte
}

func (f *readyFeed) Write(p []byte) (int, error) {
	const line = "ready\n"
	if len(f.text) < len(line) {
		if f.text = append(f.text, p[:min(len(p), len(line)-len(f.text))]...); string(f.text) == line {
			close(f.ready)
		}
	}
	return len(p), nil
}

// Socket is the forwarded one, on this machine.
func (l *Listener) Socket() string { return filepath.Join(l.dir.Path(), "s") }

// Running reports whether the program runs, as far as is known here.
func (l *Listener) Running() bool { return l.Err() == nil }

// Err is why the program ended; nil while it runs.
func (l *Listener) Err() error {
	select {
	case <-l.ended:
		return errors.New(plain.Clip(strings.TrimSpace(l.text.String()), 500))
	default:
		return nil
	}
}

// Close ends the program.
func (l *Listener) Close() error {
	if l.stdin != nil {
		_ = l.stdin.Close()
		select {
		case <-l.ended:
		case <-time.After(ending): // the connection is lost
			_ = l.cmd.Process.Kill()
			<-l.ended
		}
	}
	return l.dir.Close()
}

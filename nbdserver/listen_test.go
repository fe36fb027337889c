package nbdserver_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// A process started with its standard input as the connection, or with a
// listening socket, serves as if it had listened itself.
func TestMain(m *testing.M) {
	switch os.Getenv("NBDSERVER_TEST_MODE") {
	case "stdio", "activated":
		if err := child(os.Getenv("NBDSERVER_TEST_MODE")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(mode string) error {
	srv, err := nbdserver.New(nbdserver.Config{Catalog: single(nbdtest.NewDisk(nbdtest.Image()).ReadOnly())})
	if err != nil {
		return err
	}
	if mode == "stdio" {
		nc, err := nbdserver.Stdio(os.Stdin, os.Stdout)
		if err != nil {
			return err
		}
		return srv.ServeConn(nc, true)
	}
	ls, err := nbdserver.Activated()
	if err != nil || len(ls) != 1 || os.Getenv("LISTEN_FDS") != "" {
		return fmt.Errorf("activated with %d listeners, %w", len(ls), err)
	}
	return srv.Serve(ls[0])
}

func TestStdio(t *testing.T) {
	// libnbd's way is a socket, an ssh pipe's is two pipes.
	t.Run("libnbd", func(t *testing.T) {
		needNbdsh(t)
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("NBDSERVER_TEST_MODE", "stdio")
		contains(t, run(t, "nbdsh", "-c", `h.connect_command(["`+self+`"]); print(h.get_size()); h.shutdown()`), "4194304")
	})
	t.Run("pipes", func(t *testing.T) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "NBDSERVER_TEST_MODE=stdio")
		in, _ := cmd.StdinPipe()
		out, _ := cmd.StdoutPipe()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		e := enter(t, pipes{out, in}, nbdclient.Structured, "")
		got := make([]byte, nbdtest.ImageSize)
		if _, err := e.ReadAt(ctx(t), got, 0); err != nil || !bytes.Equal(got, nbdtest.Image()) {
			t.Error(err)
		}
		_ = e.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// pipes is the client's end of two pipes.
type pipes struct {
	io.ReadCloser
	in io.WriteCloser
}

func (p pipes) Write(b []byte) (int, error)      { return p.in.Write(b) }
func (p pipes) Close() error                     { return errors.Join(p.in.Close(), p.ReadCloser.Close()) }
func (p pipes) LocalAddr() net.Addr              { return nil }
func (p pipes) RemoteAddr() net.Addr             { return nil }
func (p pipes) SetDeadline(time.Time) error      { return nil }
func (p pipes) SetReadDeadline(time.Time) error  { return nil }
func (p pipes) SetWriteDeadline(time.Time) error { return nil }

func TestSocketActivation(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("libnbd", func(t *testing.T) {
		t.Setenv("NBDSERVER_TEST_MODE", "activated")
		contains(t, run(t, "nbdinfo", "--", "[", self, "]"), "export-size: 4194304")
	})
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	// LISTEN_PID must be the process's own: a shell knows it before exec.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0"`, self)
	cmd.Env = append(os.Environ(), "NBDSERVER_TEST_MODE=activated")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	e := enter(t, dialUnix(t, path), nbdclient.Structured, "disk")
	if _, err := e.ReadAt(ctx(t), make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
}

// between is a connection between two addresses.
type between struct {
	net.Conn
	local, remote net.Addr
}

func (b between) LocalAddr() net.Addr  { return b.local }
func (b between) RemoteAddr() net.Addr { return b.remote }

// A connection that a supervisor passes as standard input may be of another machine.
func TestConnectionsOfThisMachine(t *testing.T) {
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 10809} }
	ours, theirs := socketPair(t)
	defer func() { _, _ = ours.Close(), theirs.Close() }()
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := nbdserver.Stdio(in, out)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _, _ = pipe.Close(), in.Close(), out.Close() }()
	for name, c := range map[string]struct {
		conn  net.Conn
		local bool
	}{
		"two pipes":               {pipe, true},
		"unix socket":             {ours, true},
		"accepted unix socket":    {theirs, true},
		"loopback":                {between{local: tcp("127.0.0.1"), remote: tcp("127.0.0.2")}, true},
		"loopback, IPv6":          {between{local: tcp("::1"), remote: tcp("::1")}, true},
		"another machine":         {between{local: tcp("192.0.2.1"), remote: tcp("192.0.2.2")}, false},
		"another machine, IPv6":   {between{local: tcp("2001:db8::1"), remote: tcp("2001:db8::2")}, false},
		"own public address":      {between{local: tcp("192.0.2.1"), remote: tcp("192.0.2.1")}, false},
		"redirected to loopback":  {between{local: tcp("127.0.0.1"), remote: tcp("192.0.2.2")}, false},
		"addresses that are none": {between{}, false},
	} {
		if got := nbdserver.IsLocalConn(c.conn); got != c.local {
			t.Errorf("%s: local %v", name, got)
		}
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	_ = stale.Close()
	l, err := nbdserver.Listen("unix:" + path)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v, %v", fi.Mode(), err)
	}
	if _, err := nbdserver.Listen("unix:" + path); err == nil {
		t.Error("two servers on one socket")
	}
	_ = l.Close()
	long := "unix:/tmp/" + strings.Repeat("long", 30)
	if _, err := nbdserver.Listen(long); err == nil || !strings.Contains(err.Error(), "at most 107") {
		t.Errorf("a path that is too long: %v", err)
	}
	for _, a := range []string{"tcp:127.0.0.1:0", "tcp://127.0.0.1:0", "127.0.0.1:0", "[::1]:0", "unix://" + path, "unix:@" + t.TempDir()} {
		l, err := nbdserver.Listen(a)
		if err != nil {
			t.Errorf("%s: %v", a, err)
			continue
		}
		if !nbdserver.IsLocal(l.Addr()) {
			t.Errorf("%s is not local", a)
		}
		_ = l.Close()
	}
	// Beyond the machine only with TLS, or knowingly without.
	all, err := nbdserver.Listen("0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, _ := nbdserver.New(nbdserver.Config{Catalog: nbdserver.NewStatic()})
	if err := srv.Serve(all); !errors.Is(err, nbdserver.ErrNeedsTLS) {
		t.Errorf("plain listener beyond the machine: %v", err)
	}
}

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// child is a server started by a separate process, as a client does.
type child struct {
	parent *exec.Cmd
	pid    int
	stdin  io.WriteCloser
	stdout *bufio.Reader
	ended  chan struct{} // closed when neither parent nor server is left
}

// startChild starts "varve serve" below a shell. The listener, if any, is passed as
// systemd and libnbd do; extra is put before its environment.
func startChild(t *testing.T, env testEnv, l *net.UnixListener, extra string, args ...string) *child {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script := extra + `exec "$0" serve "$@"`
	// Its process ID is in file 4, and file 5 is open for as long as it lives.
	outer := `sh -c 'echo $$ >&4; exec 4>&-; ` + script + `' "$@" <&6 & exec 5>&- 6<&-; wait`
	cmd := exec.Command("sh", append([]string{"-c", outer, "sh", self}, args...)...)
	cmd.Env = []string{"VARVE_TEST_AS_MAIN=1", "PATH=" + os.Getenv("PATH")}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	pipe := func() (*os.File, *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		return r, w
	}
	idR, idW := pipe()
	lifeR, lifeW := pipe()
	inR, inW := pipe()
	outR, outW := pipe()
	socket, err := os.Open(os.DevNull)
	if l != nil {
		_ = socket.Close()
		socket, err = l.File()
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{socket, idW, lifeW, inR}
	cmd.Stdout = outW
	var stderr bytes.Buffer
	errR, errW := pipe()
	cmd.Stderr = errW
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, f := range []*os.File{socket, idW, lifeW, inR, outW, errW} {
		_ = f.Close()
	}
	go func() { _, _ = io.Copy(&stderr, errR) }()
	c := &child{parent: cmd, stdin: inW, stdout: bufio.NewReader(outR), ended: make(chan struct{})}
	line, err := bufio.NewReader(idR).ReadString('\n')
	if err == nil {
		c.pid, err = strconv.Atoi(strings.TrimSpace(line))
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.ended)
		_, _ = io.Copy(io.Discard, lifeR)
	}()
	t.Cleanup(func() {
		select {
		case <-c.ended:
		default:
			if p, err := os.FindProcess(c.pid); err == nil {
				_ = p.Kill()
			}
			<-c.ended
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		for _, f := range []io.Closer{idR, lifeR, inW, outR, errR} {
			_ = f.Close()
		}
	})
	return c
}

// killParent ends the process that started the server, as kill -9 does.
func (c *child) killParent(t *testing.T) {
	t.Helper()
	if err := c.parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.parent.Wait()
}

func (c *child) wantEnd(t *testing.T) {
	t.Helper()
	select {
	case <-c.ended:
	case <-time.After(patience):
		t.Fatal("the server outlives its client")
	}
}

func listenTest(t *testing.T) (*net.UnixListener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l, path
}

func enterSocket(t *testing.T, path string) *nbdclient.Export {
	t.Helper()
	uri := (&nbdclient.URI{Network: "unix", Address: path}).String()
	for started := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		e, err := enterExport(t.Context(), uri)
		if err == nil {
			t.Cleanup(func() { _ = e.Close() })
			return e
		}
		// The server has not made its socket yet, or does not listen on it yet.
		waiting := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
		if !waiting || time.Since(started) > patience {
			t.Fatal(err)
		}
	}
}

// A server that a client started ends with the client, however that ends, and does not write
// to the client's standard output. A server that a user or systemd started stays.
func TestServeEndsWithItsClient(t *testing.T) {
	env := newTestEnv(t)
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
	disk := filepath.Join(env["HOME"], "disk.img")
	if err := os.WriteFile(disk, bytes.Repeat([]byte("disk"), 1<<14), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, env, "backup", disk, "--volume", "shop/db")
	const activate = "export LISTEN_FDS=1 LISTEN_PID=$$; "
	for _, c := range []struct {
		name, extra string
		args        []string
		ends        bool
	}{
		{"a client's socket", activate, nil, true},
		{"a client's socket, told to stay", activate, []string{"--exit-with-parent=false"}, false},
		{"systemd's socket", activate + "export SYSTEMD_EXEC_PID=$$; ", nil, false},
		{"a user's", "", []string{"--listen"}, false},
		{"a user's, told to end", "", []string{"--exit-with-parent", "--listen"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := append(c.args, "shop/db@latest")
			var path string
			var l *net.UnixListener
			if c.extra != "" {
				l, path = listenTest(t)
			} else {
				path = filepath.Join(t.TempDir(), "s")
				args = append(c.args, "unix:"+path, "shop/db@latest")
			}
			srv := startChild(t, env, l, c.extra, args...)
			e := enterSocket(t, path)
			got := make([]byte, 4)
			read := func() error {
				_, err := e.ReadAt(t.Context(), got, 0)
				if err == nil && string(got) != "disk" {
					err = fmt.Errorf("read %q", got)
				}
				return err
			}
			if err := read(); err != nil {
				t.Fatal(err)
			}
			srv.killParent(t)
			if c.ends {
				srv.wantEnd(t)
			} else {
				if err := read(); err != nil {
					t.Errorf("after its parent: %v", err)
				}
				if p, err := os.FindProcess(srv.pid); err == nil {
					_ = p.Kill()
				}
				<-srv.ended
			}
			out, err := io.ReadAll(srv.stdout)
			if err != nil || l != nil && len(out) > 0 {
				t.Errorf("on the client's standard output: %q, %v", out, err)
			}
			if l == nil && !strings.Contains(string(out), "nbdinfo") {
				t.Errorf("on the user's: %q", out)
			}
		})
	}
	t.Run("standard input and output", func(t *testing.T) {
		srv := startChild(t, env, nil, "", "--stdio", "shop/db@latest")
		hello := make([]byte, 18)
		if _, err := io.ReadFull(srv.stdout, hello); err != nil || string(hello[:8]) != "NBDMAGIC" {
			t.Fatalf("%q, %v", hello, err)
		}
		srv.killParent(t) // the pipe stays open here
		srv.wantEnd(t)
	})
}

// With --once the server ends when the last client leaves, and not before.
func TestServeOnce(t *testing.T) {
	env := newTestEnv(t)
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
	disk := filepath.Join(env["HOME"], "disk.img")
	if err := os.WriteFile(disk, bytes.Repeat([]byte("disk"), 1<<14), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, env, "backup", disk, "--volume", "shop/db")
	path := filepath.Join(t.TempDir(), "s")
	cmd, _, stderr := varveProcess(t, env, "serve", "shop/db@latest", "--once", "--listen", "unix:"+path)
	first := enterSocket(t, path)
	second := enterSocket(t, path)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	third := enterSocket(t, path)
	if _, err := second.ReadAt(t.Context(), make([]byte, 4), 0); err != nil {
		t.Fatal(err)
	}
	_ = second.Close()
	_ = third.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stderr)
	}
}

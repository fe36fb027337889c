package nbdtest

import (
	"errors"
	"net"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/nbdserver"
)

// Serve runs a server on a unix socket until the test ends, and returns the socket's path.
func Serve(t testing.TB, cfg nbdserver.Config) (srv *nbdserver.Server, socket string) {
	t.Helper()
	srv, err := nbdserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(t.TempDir(), "nbd")
	l, err := nbdserver.Listen("unix:" + socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-served; !errors.Is(err, nbdserver.ErrServerClosed) {
			t.Errorf("Serve returned %v", err)
		}
	})
	return srv, socket
}

// DialUnix is a Target's Dial for a server on that socket.
func DialUnix(socket string) func(testing.TB) net.Conn {
	return func(t testing.TB) net.Conn {
		t.Helper()
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
}

package source

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/qemu/qmp"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// serverDir is where the NBD server of a machine's QEMU has its socket: the same for each run,
// so that the server of one that was killed is found. The socket is in a directory of QEMU's
// user within.
func serverDir(key string) string { return filepath.Join(DefaultScratch, "varve-"+key+".nbd") }

func serverSocket(key string) string { return filepath.Join(serverDir(key), "s", "nbd") }

// startServer has QEMU serve NBD. A QEMU has one server: one that runs already must be known.
func (m *qmpMachine) startServer(ctx context.Context, uid, gid int) error {
	if m.uri.nbd != nil {
		m.server = m.uri.nbd
		return nil
	}
	socket := serverSocket(m.key)
	m.server = &nbdclient.URI{Network: "unix", Address: socket}
	if found, err := listens(ctx, socket); found || err != nil {
		m.started = found // by a backup that was killed, whose exports are another volume's
		return err
	}
	if err := os.RemoveAll(serverDir(m.key)); err != nil {
		return err
	}
	if err := ownDir(serverDir(m.key), 0o711); err != nil {
		return fmt.Errorf("a directory for QEMU's NBD server: %w", err)
	}
	dir := filepath.Dir(socket)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := give(dir, uid, gid); err != nil {
		return err
	}
	err := m.conn.Do(ctx, "nbd-server-start", args{"addr": args{"type": "unix", "data": args{"path": socket}}}, nil)
	var refused *qmp.Error
	if errors.As(err, &refused) { // else the server may run, and the next backup has to find it
		err = errors.Join(err, os.RemoveAll(serverDir(m.key)))
	}
	if refused != nil && strings.Contains(refused.Text, "already running") {
		return fmt.Errorf("this QEMU runs an NBD server already, and can have only one: add its address to the source, as in ?nbd=nbd://localhost:10809 (%w)", err)
	}
	m.started = refused == nil
	return err
}

// listens reports whether a server accepts connections at a socket.
func listens(ctx context.Context, socket string) (bool, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	switch {
	case nobody(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("QEMU's NBD server: %w", err)
	}
	return true, conn.Close()
}

// nobody reports whether a connection failed as no program has the socket. Any other failure may be
// of one that is busy.
func nobody(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT)
}

// stopServer ends the server, unless it exports something that is not ours.
func (m *qmpMachine) stopServer(ctx context.Context) error {
	exports, err := readExports(ctx, m.conn)
	if err != nil {
		return err
	}
	for _, e := range exports {
		if e.Type == "nbd" {
			return nil
		}
	}
	err = m.conn.Do(ctx, "nbd-server-stop", nil, nil)
	var refused *qmp.Error
	if err != nil && !errors.As(err, &refused) {
		return err
	}
	return os.RemoveAll(serverDir(m.key)) // refused: it runs no more
}

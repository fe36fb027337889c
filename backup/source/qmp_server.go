package source

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

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
	if listens(ctx, socket) {
		m.started = true // of a backup that was killed, whose exports are another volume's
		return nil
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
	if err != nil {
		err = errors.Join(err, os.RemoveAll(serverDir(m.key)))
	}
	var refused *qmp.Error
	if errors.As(err, &refused) && strings.Contains(refused.Text, "already running") {
		return fmt.Errorf("this QEMU runs an NBD server already, and can have only one: add its address to the source, as in ?nbd=nbd://localhost:10809 (%w)", err)
	}
	m.started = err == nil
	return err
}

// listens reports whether a server accepts connections at a socket.
func listens(ctx context.Context, socket string) bool {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
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
	if errors.As(err, &refused) { // it runs no more
		err = nil
	}
	return errors.Join(err, os.RemoveAll(serverDir(m.key)))
}

// Package nbdattach connects NBD exports to the Linux kernel, as a block device /dev/nbdN: by
// netlink if the kernel has it (4.12 and later), else by ioctl.
//
// Negotiation happens here and transmission in the kernel, which uses simple replies and
// supports neither TLS nor metadata contexts. Sources: the kernel's
// include/uapi/linux/nbd-netlink.h, include/uapi/linux/nbd.h, drivers/block/nbd.c.
package nbdattach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// Any is the index that lets the kernel choose a free device.
const Any = -1

// Options of an attachment.
type Options struct {
	// Index is N of /dev/nbdN; Any for a free one.
	Index int
	// Connections to the server, 1 to 64. More than one needs a server with
	// CAN_MULTI_CONN, and a disk that is read-only.
	Connections int
	// BlockSize is the logical sector size, 512 to 4096; 0 for 512.
	BlockSize uint32
	// Timeout is how long the kernel waits for a reply before it considers the connection
	// dead; 0 forever, which a writable disk needs.
	Timeout time.Duration
	// DeadTimeout is how long requests wait for a new connection after the
	// last one died, before they fail. Reconnecting needs it.
	DeadTimeout time.Duration
	// IOTimeout is how often the kernel checks whether the connection of a request was
	// replaced, to send it again there; 0 for Tune's choice.
	IOTimeout time.Duration
	// UntilClosed detaches the device when its last user, program or mount, closes it.
	// ServeIoctl does not support it.
	UntilClosed bool
}

var (
	// ErrNoDriver means that this kernel has no nbd driver loaded.
	ErrNoDriver = errors.New("this kernel has no nbd driver loaded: try \"modprobe nbd\"")
	// ErrNoNetlink means that the driver is older than its netlink interface.
	ErrNoNetlink = errors.New("the nbd driver has no netlink interface")
	// ErrWritable means that with these options the kernel may send a write again while the
	// first one is still at the server: it would then run after later writes to the same
	// place, and undo them.
	ErrWritable = errors.New("a writable disk takes one connection and no --timeout: otherwise the kernel may repeat a write after a later one")
)

// check rejects options that do not fit a disk.
func (o Options) check(info nbdclient.Info) error {
	if info.Flags&proto.FlagReadOnly == 0 && (o.Connections > 1 || o.Timeout > 0) {
		return fmt.Errorf("attach %s: %w", info.Name, ErrWritable)
	}
	return nil
}

const maxConnections = 64

// dialed is an export opened over several connections.
type dialed struct {
	info  nbdclient.Info
	conns []net.Conn
	files []*os.File // of conns
}

// dial opens the export of a URI over n connections. All must report the same export and
// size: with an alias they might not.
func dial(ctx context.Context, u *nbdclient.URI, n int) (_ *dialed, err error) {
	if u.TLS {
		return nil, errors.New("the kernel's NBD client knows no TLS: put a TLS proxy or a tunnel between, or use a unix socket")
	}
	if n < 1 || n > maxConnections {
		return nil, fmt.Errorf("%d connections: use 1 to %d", n, maxConnections)
	}
	all := &dialed{}
	defer func() {
		if err != nil {
			all.close()
		}
	}()
	for i := range n {
		c, err := nbdclient.Dial(ctx, u, nil)
		if err != nil {
			return nil, err
		}
		if err := all.enter(c, u.Export); err != nil {
			return nil, err
		}
		if i == 0 && n > 1 && all.info.Flags&proto.FlagCanMultiConn == 0 {
			return nil, fmt.Errorf("the server does not allow several connections to %s: use --connections 1", all.info.Name)
		}
	}
	return all, nil
}

// enter adds a connection on which a client opens the export. The client is not used any
// more.
func (d *dialed) enter(c *nbdclient.Client, export string) error {
	info, conn, err := c.HandOver(export)
	if err != nil {
		_ = c.Close()
		return err
	}
	d.conns = append(d.conns, conn)
	f, err := conn.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		return fmt.Errorf("take the socket of a connection: %w", err)
	}
	d.files = append(d.files, f)
	if len(d.conns) == 1 {
		d.info = info
	} else if info.Name != d.info.Name || info.Size != d.info.Size {
		return fmt.Errorf("the server gave %s and then %s for the same name", d.info.Name, info.Name)
	}
	return nil
}

// close closes this process's part of the connections. What the kernel took over stays.
func (d *dialed) close() {
	for _, f := range d.files {
		_ = f.Close()
	}
	for _, c := range d.conns {
		_ = c.Close()
	}
}

// Device returns the device name of an index.
func Device(index int) string { return "/dev/nbd" + strconv.Itoa(index) }

// ParseDevice parses /dev/nbdN, nbdN or N.
func ParseDevice(s string) (int, error) {
	text := strings.TrimPrefix(filepath.Base(s), "nbd")
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > 1<<20-1 {
		return 0, fmt.Errorf("%q is no NBD device: write /dev/nbd0", s)
	}
	return n, nil
}

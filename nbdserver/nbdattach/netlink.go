package nbdattach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"

	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// Commands and attributes of the netlink family "nbd", version 1.
const (
	family        = "nbd"
	familyVersion = 1
	deadGroup     = "nbd_mc_group"

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4

	attrIndex       = 1
	attrSize        = 2
	attrBlockSize   = 3
	attrTimeout     = 4 // seconds
	attrServerFlags = 5
	attrClientFlags = 6
	attrSockets     = 7
	attrDeadTimeout = 8 // seconds

	sockItem = 1
	sockFD   = 1

	clientDisconnectOnClose = 1 << 1 // NBD_CFLAG_DISCONNECT_ON_CLOSE of uapi/linux/nbd.h
)

// Available tells why nothing can be attached by netlink here: ErrNoDriver,
// ErrNoNetlink; nil where it can. Containers see the driver's netlink interface
// in the host's network namespace only.
func Available() error {
	nl, _, err := open()
	if err != nil {
		return err
	}
	return nl.Close()
}

// Attachment is a device that the kernel serves from an export.
type Attachment struct {
	Index int
	Info  nbdclient.Info
}

// Connect attaches the export of a URI by netlink and returns once the device
// is there. The kernel keeps the connections: the caller may end.
func Connect(ctx context.Context, u *nbdclient.URI, opt Options) (*Attachment, error) {
	nl, fam, err := open()
	if err != nil {
		return nil, err
	}
	defer nl.Close()
	d, err := dial(ctx, u, opt.Connections)
	if err != nil {
		return nil, err
	}
	defer d.close()
	return connect(nl, fam, d, u.Export, opt)
}

// ConnectOver is Connect over a connection that is there already, such as one end
// of a socket pair. It owns nc.
func ConnectOver(nc net.Conn, export string, opt Options) (*Attachment, error) {
	c, err := nbdclient.New(nc)
	if err != nil {
		return nil, err
	}
	d := &dialed{}
	defer d.close()
	if err := d.enter(c, export); err != nil {
		return nil, err
	}
	nl, fam, err := open()
	if err != nil {
		return nil, err
	}
	defer nl.Close()
	return connect(nl, fam, d, export, opt)
}

// connect gives the connections to the kernel.
func connect(nl *genetlink.Conn, fam genetlink.Family, d *dialed, export string, opt Options) (*Attachment, error) {
	block := opt.BlockSize
	if block == 0 {
		block = 512
	}
	e := netlink.NewAttributeEncoder()
	if opt.Index != Any {
		e.Uint32(attrIndex, uint32(opt.Index))
	}
	e.Uint64(attrSize, d.info.Size/uint64(block)*uint64(block))
	e.Uint64(attrBlockSize, uint64(block))
	e.Uint64(attrServerFlags, uint64(d.info.Flags))
	if opt.Timeout > 0 {
		e.Uint64(attrTimeout, seconds(opt.Timeout))
	}
	if opt.DeadTimeout > 0 {
		e.Uint64(attrDeadTimeout, seconds(opt.DeadTimeout))
	}
	if opt.UntilClosed {
		e.Uint64(attrClientFlags, clientDisconnectOnClose)
	}
	e.Nested(attrSockets, sockets(d.files))
	answers, err := send(nl, fam, cmdConnect, e, netlink.Request)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", export, err)
	}
	a := &Attachment{Index: opt.Index, Info: d.info}
	for _, m := range answers {
		if n, ok := index(m); ok {
			a.Index = n
		}
	}
	if a.Index == Any {
		return nil, errors.New("the kernel did not say which device it took")
	}
	return a, nil
}

func seconds(d time.Duration) uint64 { return uint64(max(d.Round(time.Second)/time.Second, 1)) }

func open() (*genetlink.Conn, genetlink.Family, error) {
	nl, err := genetlink.Dial(nil)
	if err != nil {
		return nil, genetlink.Family{}, fmt.Errorf("open netlink: %w", err)
	}
	fam, err := nl.GetFamily(family)
	switch {
	case err == nil:
		return nl, fam, nil
	case errors.Is(err, os.ErrNotExist) && hasDriver():
		err = ErrNoNetlink
	case errors.Is(err, os.ErrNotExist):
		err = ErrNoDriver
	}
	return nil, fam, errors.Join(err, nl.Close())
}

func sockets(files []*os.File) func(*netlink.AttributeEncoder) error {
	return func(e *netlink.AttributeEncoder) error {
		for _, f := range files {
			e.Nested(sockItem, func(e *netlink.AttributeEncoder) error {
				e.Uint32(sockFD, uint32(f.Fd()))
				return nil
			})
		}
		return nil
	}
}

func send(nl *genetlink.Conn, fam genetlink.Family, cmd uint8, e *netlink.AttributeEncoder, flags netlink.HeaderFlags) ([]genetlink.Message, error) {
	data, err := e.Encode()
	if err != nil {
		return nil, err
	}
	return nl.Execute(genetlink.Message{Header: genetlink.Header{Command: cmd, Version: familyVersion}, Data: data}, fam.ID, flags)
}

// index reads the device index of a message.
func index(m genetlink.Message) (int, bool) {
	d, err := netlink.NewAttributeDecoder(m.Data)
	if err != nil {
		return 0, false
	}
	n, ok := 0, false
	for d.Next() {
		if d.Type() == attrIndex {
			n, ok = int(d.Uint32()), true
		}
	}
	return n, ok && d.Err() == nil
}

// Disconnect detaches a device; it returns once the kernel has let go of it.
func Disconnect(index int) error {
	nl, fam, err := open()
	if errors.Is(err, ErrNoNetlink) {
		return disconnectIoctl(index)
	}
	if err != nil {
		return err
	}
	defer nl.Close()
	if isFree(index) {
		return fmt.Errorf("%s is not attached", Device(index))
	}
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(index))
	if _, err := send(nl, fam, cmdDisconnect, e, netlink.Request|netlink.Acknowledge); err != nil {
		return fmt.Errorf("detach %s: %w", Device(index), err)
	}
	return nil
}

// Watch reconnects a device when one of its connections dies, until ctx ends or
// the device is detached. The device needs a DeadTimeout, which bounds how long
// its requests wait. The export must be the same as before; a server that gives
// another is not used.
func Watch(ctx context.Context, a *Attachment, u *nbdclient.URI, log *slog.Logger) error {
	nl, fam, err := open()
	if err != nil {
		return err
	}
	defer nl.Close()
	joined := false
	for _, g := range fam.Groups {
		if g.Name == deadGroup {
			if err := nl.JoinGroup(g.ID); err != nil {
				return fmt.Errorf("listen for dead connections: %w", err)
			}
			joined = true
		}
	}
	if !joined {
		return fmt.Errorf("%w that tells of dead connections", ErrNoNetlink)
	}
	stop := context.AfterFunc(ctx, func() { _ = nl.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		if isFree(a.Index) {
			return nil
		}
		// The kernel tells nothing of a device that is detached.
		if ctx.Err() == nil {
			_ = nl.SetReadDeadline(time.Now().Add(time.Second))
		}
		messages, _, err := nl.Receive()
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return fmt.Errorf("listen for dead connections: %w", err)
		}
		for _, m := range messages {
			if n, ok := index(m); !ok || n != a.Index || m.Header.Command != cmdLinkDead {
				continue
			}
			log.WarnContext(ctx, "a connection died; connecting again", "device", Device(a.Index))
			if err := reconnect(ctx, a, u, log); err != nil {
				return err
			}
		}
	}
}

// reconnect gives the device one connection for the one that died, trying until
// ctx ends or the device is gone.
func reconnect(ctx context.Context, a *Attachment, u *nbdclient.URI, log *slog.Logger) error {
	same := *u
	same.Export = a.Info.Name // the disk it is, whatever an alias means by now
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		err := replace(ctx, a, &same)
		if err == nil {
			log.InfoContext(ctx, "connected again", "device", Device(a.Index))
			return nil
		}
		if isFree(a.Index) || ctx.Err() != nil {
			return nil //nolint:nilerr // detached, or told to stop: there is nothing to connect again
		}
		log.WarnContext(ctx, "cannot connect again yet", "device", Device(a.Index), "err", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

func replace(ctx context.Context, a *Attachment, u *nbdclient.URI) error {
	d, err := dial(ctx, u, 1)
	if err != nil {
		return err
	}
	defer d.close()
	if d.info.Size != a.Info.Size || d.info.Name != a.Info.Name {
		return fmt.Errorf("the server gives %s of %d bytes now", d.info.Name, d.info.Size)
	}
	nl, fam, err := open()
	if err != nil {
		return err
	}
	defer nl.Close()
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(a.Index))
	e.Nested(attrSockets, sockets(d.files))
	if _, err := send(nl, fam, cmdReconfigure, e, netlink.Request|netlink.Acknowledge); err != nil {
		return fmt.Errorf("give the kernel a new connection: %w", err)
	}
	return nil
}

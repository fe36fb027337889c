package nbdattach

import (
	"context"
	"errors"
	"fmt"
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
	attrBackend     = 10

	sockItem = 1
	sockFD   = 1

	clientDisconnectOnClose = 1 << 1 // NBD_CFLAG_DISCONNECT_ON_CLOSE of uapi/linux/nbd.h
)

// Available returns why nothing can be attached by netlink here, ErrNoDriver or ErrNoNetlink,
// or nil. Containers see the driver's netlink interface in the host's network namespace only.
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

	connections int
	backend     string // the kernel's identifier of the disk; empty if it has none
	adopted     bool   // made by another process; its connections may be dead
}

// Connect attaches the export of a URI by netlink and returns once the device exists. The
// kernel keeps the connections: the caller may end.
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

// ConnectOver is Connect over an existing connection, such as one end of a socket pair. It
// owns nc.
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

// connect passes the connections to the kernel.
func connect(nl *genetlink.Conn, fam genetlink.Family, d *dialed, export string, opt Options) (*Attachment, error) {
	if err := opt.check(d.info); err != nil {
		return nil, err
	}
	answers, err := send(nl, fam, cmdConnect, connectRequest(d, opt), netlink.Request)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", export, err)
	}
	a := &Attachment{Index: opt.Index, Info: d.info, connections: len(d.conns), backend: backendOf(d.info)}
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

// connectRequest returns the message that makes a device.
func connectRequest(d *dialed, opt Options) *netlink.AttributeEncoder {
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
	deadTimeout(e, opt.DeadTimeout)
	if b := backendOf(d.info); b != "" {
		e.String(attrBackend, b)
	}
	if opt.UntilClosed {
		e.Uint64(attrClientFlags, clientDisconnectOnClose)
	}
	e.Nested(attrSockets, sockets(d.files))
	return e
}

// deadTimeout sets how long requests wait for a connection, zero included: the default
// depends on the kernel's version.
func deadTimeout(e *netlink.AttributeEncoder, d time.Duration) {
	n := uint64(0)
	if d > 0 {
		n = seconds(d)
	}
	e.Uint64(attrDeadTimeout, n)
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

// Disconnect detaches a device; it returns once the kernel has released it.
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

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdattach"
)

// nbdDevices makes block devices by the kernel's NBD driver, each served by this process
// over a pair of sockets: nothing listens, and nobody else can connect.
type nbdDevices struct{ log *slog.Logger }

var _ fusefs.BlockDevices = nbdDevices{}

// kernelDevices chooses what stands below a kernel mount: NBD where the driver is
// loaded, else (nil) a loop device.
func (a *app) kernelDevices(loop bool) fusefs.BlockDevices {
	if loop {
		return nil
	}
	if err := nbdattach.Available(); err != nil {
		a.log.Debug("a loop device is used", "reason", err)
		return nil
	}
	return nbdDevices{a.log}
}

// attachTries bounds how often a device may be opened and closed by another program,
// such as udev, before it is opened here.
const attachTries = 16

func (n nbdDevices) Attach(ctx context.Context, d *fusefs.DeviceDisk) (*fusefs.BlockDevice, error) {
	srv, err := nbdserver.New(nbdserver.Config{
		Catalog: nbdserver.NewStatic(nbdserver.Opened{Export: d, Name: d.Name, ReadOnly: d.ReadOnly()}), Logger: n.log,
	})
	if err != nil {
		return nil, fmt.Errorf("serve the disk: %w", err)
	}
	for range attachTries {
		if err = ctx.Err(); err != nil {
			break
		}
		var dev *fusefs.BlockDevice
		if dev, err = n.attach(srv, d.Name); err != nil || dev != nil {
			if err != nil {
				break
			}
			return dev, nil
		}
		err = errors.New("attach an NBD device: other programs take each that is free; try again, or use --loop")
	}
	srv.Close()
	return nil, err
}

// attach tries once; there is neither device nor error where another program closed
// the device, and so detached it, before it was opened here.
func (n nbdDevices) attach(srv *nbdserver.Server, name string) (*fusefs.BlockDevice, error) {
	kernel, ours, err := socketPair()
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.ServeConn(ours, true) // local, so not refused; else it ends as the device does
	}()
	at, err := nbdattach.ConnectOver(kernel, name, nbdattach.Options{Index: nbdattach.Any, UntilClosed: true})
	if err != nil {
		_ = ours.Close()
		<-done
		return nil, err
	}
	token, path := nbdattach.AttachedBy(at.Index), nbdattach.Device(at.Index)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		err = fmt.Errorf("open %s: %w (--loop uses a loop device instead)", path, err)
		if nbdattach.AttachedBy(at.Index) == token {
			err = errors.Join(err, nbdattach.Disconnect(at.Index))
		}
		_ = ours.Close()
		<-done
		return nil, err
	}
	file := os.NewFile(uintptr(fd), path) //nolint:gosec // a descriptor
	if token == "" || nbdattach.AttachedBy(at.Index) != token {
		_ = file.Close()
		_ = ours.Close()
		<-done
		return nil, nil //nolint:nilnil // see above
	}
	return &fusefs.BlockDevice{File: file, Token: token, Done: done, Close: func() error {
		srv.Close()
		<-done
		return nil
	}}, nil
}

// socketPair gives two connected sockets.
func socketPair() (a, b net.Conn, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make sockets for the NBD driver: %w", err)
	}
	var conns [2]net.Conn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "nbd") //nolint:gosec // a descriptor
		c, connErr := net.FileConn(f)
		err = errors.Join(err, connErr, f.Close())
		conns[i] = c
	}
	if err != nil {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
		return nil, nil, fmt.Errorf("make sockets for the NBD driver: %w", err)
	}
	return conns[0], conns[1], nil
}

func (nbdDevices) Token(device string) string {
	index, err := nbdattach.ParseDevice(device)
	if err != nil {
		return ""
	}
	return nbdattach.AttachedBy(index)
}

func (n nbdDevices) Detach(device string) error {
	index, err := nbdattach.ParseDevice(device)
	if err != nil {
		return err
	}
	if err := nbdattach.Disconnect(index); err != nil && n.Token(device) != "" {
		return err
	}
	return nil
}

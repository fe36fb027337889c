package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/blockdev/nbdattach"
	"github.com/varve-io/varve/nbdserver"
)

// NBD makes block devices by the kernel's NBD driver. This process serves each over a pair of
// sockets: nothing listens, and no other process can connect.
type NBD struct {
	Log *slog.Logger // nil for none
	// ReadTimeout bounds one read of the disk; then it fails, and so do the kernel's readers.
	// 0 for no bound.
	ReadTimeout time.Duration
}

var _ Driver = NBD{}

// attachTries bounds how often a device may be opened and closed by another program,
// such as udev, before it is opened here.
const attachTries = 16

// Attach serves a disk and makes a device from it.
func (n NBD) Attach(ctx context.Context, d *Disk) (*Device, error) {
	srv, err := nbdserver.New(nbdserver.Config{
		Catalog: nbdserver.NewStatic(nbdserver.Opened{Export: d, Name: d.Name, ReadOnly: d.ReadOnly()}), ReadTimeout: n.ReadTimeout, Logger: n.Log,
	})
	if err != nil {
		return nil, fmt.Errorf("serve the disk: %w", err)
	}
	for range attachTries {
		if err = ctx.Err(); err != nil {
			break
		}
		var dev *Device
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

// attach tries once; it returns neither device nor error if another program closed the
// device, and so detached it, before it was opened here.
func (n NBD) attach(srv *nbdserver.Server, name string) (*Device, error) {
	kernel, ours, err := socketPair()
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.ServeConn(ours, true) // local, so not refused; it ends with the device
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
	file := os.NewFile(uintptr(fd), path)
	if token == "" || nbdattach.AttachedBy(at.Index) != token {
		_ = file.Close()
		_ = ours.Close()
		<-done
		return nil, nil // see above
	}
	return &Device{File: file, Token: token, Done: done, Close: func() error {
		srv.Close()
		<-done
		return nil
	}}, nil
}

// socketPair returns two connected sockets.
func socketPair() (a, b net.Conn, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make sockets for the NBD driver: %w", err)
	}
	var conns [2]net.Conn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "nbd")
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

// Token returns the token of a device's attachment.
func (NBD) Token(device string) string {
	index, err := nbdattach.ParseDevice(device)
	if err != nil {
		return ""
	}
	return nbdattach.AttachedBy(index)
}

// Detach removes a device at once.
func (n NBD) Detach(device string) error {
	index, err := nbdattach.ParseDevice(device)
	if err != nil {
		return err
	}
	if err := nbdattach.Disconnect(index); err != nil && n.Token(device) != "" {
		return err
	}
	return nil
}

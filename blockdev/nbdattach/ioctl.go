package nbdattach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// Requests of include/uapi/linux/nbd.h.
const (
	ioSetSock       = 0xab00
	ioSetBlockSize  = 0xab01
	ioDoIt          = 0xab03
	ioClearSock     = 0xab04
	ioSetSizeBlocks = 0xab07
	ioDisconnect    = 0xab08
	ioSetTimeout    = 0xab09
	ioSetFlags      = 0xab0a
)

// ServeIoctl attaches an export by ioctl, for kernels without the netlink interface, and
// returns when the device is detached: this process has to stay. ready is called once the
// device is set up. When ctx ends, the device is detached.
func ServeIoctl(ctx context.Context, u *nbdclient.URI, opt Options, ready func(*Attachment) error) error {
	if opt.Index == Any {
		return errors.New("without netlink the kernel chooses no device: name one, such as /dev/nbd0")
	}
	if !hasDriver() {
		return ErrNoDriver
	}
	dev, err := os.OpenFile(Device(opt.Index), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	defer dev.Close()
	d, err := dial(ctx, u, opt.Connections)
	if err != nil {
		return err
	}
	defer d.close()
	if err := opt.check(d.info); err != nil {
		return err
	}
	fd := int(dev.Fd())
	block := int(opt.BlockSize)
	if block == 0 {
		block = 512
	}
	set := func(what string, req uint, value int) error {
		if err := unix.IoctlSetInt(fd, req, value); err != nil {
			return fmt.Errorf("attach %s: set %s: %w", Device(opt.Index), what, err)
		}
		return nil
	}
	if err := errors.Join(
		set("block size", ioSetBlockSize, block),
		set("size", ioSetSizeBlocks, int(d.info.Size/uint64(block))),
		set("flags", ioSetFlags, int(d.info.Flags)),
	); err != nil {
		return err
	}
	if opt.Timeout > 0 {
		if err := set("timeout", ioSetTimeout, int(seconds(opt.Timeout))); err != nil {
			return err
		}
	}
	if err := setSockets(d.files, set); err != nil {
		return errors.Join(err, clearSockets(fd))
	}
	done := make(chan error, 1)
	go func() { done <- unix.IoctlSetInt(fd, ioDoIt, 0) }() // ends with the connection
	if err := waitCapacity(opt.Index, d.info.Size >= uint64(block), done); err != nil {
		return errors.Join(err, clearSockets(fd))
	}
	if err := ready(&Attachment{Index: opt.Index, Info: d.info, connections: len(d.conns)}); err != nil {
		return errors.Join(err, set("disconnection", ioDisconnect, 0), <-done, clearSockets(fd))
	}
	select {
	case err = <-done:
	case <-ctx.Done():
		err = errors.Join(set("disconnection", ioDisconnect, 0), <-done)
	}
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ETIMEDOUT) {
		err = fmt.Errorf("the connection to the server was lost: %w", err)
	}
	return errors.Join(err, clearSockets(fd))
}

// setSockets passes the connections to the device, all from one thread: the kernel accepts
// further ones only from the task that passed the first (nbd_add_socket).
func setSockets(files []*os.File, set func(what string, req uint, value int) error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for _, f := range files {
		if err := set("connection", ioSetSock, int(f.Fd())); err != nil {
			return err
		}
	}
	return nil
}

// waitCapacity waits until the kernel shows the size of the device, which happens some time
// during DO_IT.
func waitCapacity(index int, hasAny bool, done <-chan error) error {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for hasAny {
		size, err := os.ReadFile(filepath.Join("/sys/block", "nbd"+strconv.Itoa(index), "size"))
		if err == nil && strings.TrimSpace(string(size)) != "0" {
			return nil
		}
		select {
		case err := <-done:
			return errors.Join(fmt.Errorf("attach %s: the connection ended at once", Device(index)), err)
		case <-t.C:
		}
	}
	return nil
}

func clearSockets(fd int) error {
	if err := unix.IoctlSetInt(fd, ioClearSock, 0); err != nil {
		return fmt.Errorf("take the connections from the device: %w", err)
	}
	return nil
}

func disconnectIoctl(index int) error {
	dev, err := os.OpenFile(Device(index), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	defer dev.Close()
	if err := unix.IoctlSetInt(int(dev.Fd()), ioDisconnect, 0); err != nil {
		return fmt.Errorf("detach %s: %w", Device(index), err)
	}
	return nil
}

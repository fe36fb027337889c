package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/blockdev/nbdattach"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

type attachFlags struct {
	connections int
	blockSize   bytesize.Value
	timeout     time.Duration
	ioTimeout   time.Duration
	reconnect   bool
	deadTimeout time.Duration
	ioctl       bool
}

func newAttachCommand(a *app) *cobra.Command {
	f := attachFlags{blockSize: 512}
	cmd := &cobra.Command{
		Use:     "attach URI [/dev/nbdN]",
		GroupID: groupRead,
		Short:   "Attach an NBD export to the kernel as a block device",
		Long: `Attach an NBD export to the Linux kernel as a block device. Without a device
the kernel takes a free one. It needs root and the nbd driver ("modprobe nbd").

The command ends when the device is ready. With --reconnect it keeps running and
connects the device again when the server restarts; requests wait until then.
Started again for the same export and device, it takes that device over. On
kernels without the driver's netlink interface, or with --ioctl, it also runs
until the device is detached.

A writable export takes one connection and no --timeout: with more, the kernel
may repeat a write after a later one to the same place.`,
		Example: `  varve attach 'nbd+unix:///shop/db@latest?socket=/run/varve-nbd.sock' --connections 4
  mount -o ro,noload /dev/nbd0 /mnt
  varve detach /dev/nbd0
  varve attach 'nbd+unix:///shop/db@latest?socket=/run/varve-nbd.sock' /dev/nbd0 --reconnect`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			opt := nbdattach.Options{Index: nbdattach.Any, Connections: f.connections, BlockSize: uint32(f.blockSize), Timeout: f.timeout, IOTimeout: f.ioTimeout}
			if f.reconnect {
				opt.DeadTimeout = f.deadTimeout
			}
			if b := int64(f.blockSize); b < 512 || b > 4096 || b&(b-1) != 0 {
				return usagef("--block-size is 512, 1K, 2K or 4K")
			}
			if f.timeout < 0 || f.ioTimeout < 0 || f.deadTimeout <= 0 {
				return usagef("--timeout, --io-timeout and --dead-timeout cannot be negative, and --dead-timeout not zero")
			}
			u, err := nbdclient.ParseURI(args[0])
			if err != nil {
				return &usageError{err}
			}
			if len(args) == 2 {
				if opt.Index, err = nbdattach.ParseDevice(args[1]); err != nil {
					return &usageError{err}
				}
			}
			return a.attach(cmd.Context(), u, opt, f)
		},
	}
	fl := cmd.Flags()
	fl.IntVar(&f.connections, "connections", 1, "connections to the server, 1 to 64")
	fl.Var(&f.blockSize, "block-size", "logical sector size of the device, 512 to 4K")
	fl.DurationVar(&f.timeout, "timeout", 0, "treat a connection as dead when a request gets no reply for this long (default never)")
	fl.DurationVar(&f.ioTimeout, "io-timeout", 0, "time until requests of a dead connection are sent again on a new one (default 5s with one connection, 30s with several, where a slower request also closes its connection)")
	fl.BoolVar(&f.reconnect, "reconnect", false, "keep running, and connect again when a connection dies")
	fl.DurationVar(&f.deadTimeout, "dead-timeout", time.Minute, "with --reconnect, how long requests wait for a new connection before they fail")
	fl.BoolVar(&f.ioctl, "ioctl", false, "use ioctl even if the kernel has netlink")
	return cmd
}

// attached is what "varve attach -o json" prints.
type attached struct {
	Device   string `json:"device"`
	Export   string `json:"export"`
	Size     uint64 `json:"size"`
	ReadOnly bool   `json:"readOnly"`
}

func (a *app) attach(ctx context.Context, u *nbdclient.URI, opt nbdattach.Options, f attachFlags) error {
	if f.ioctl && f.reconnect {
		return usagef("--reconnect needs netlink: leave out --ioctl")
	}
	ready := func(at *nbdattach.Attachment) error {
		if err := at.Tune(opt); err != nil {
			a.log.Warn("the device keeps the kernel's own limits: a restart of the server may stall it for 30 s", "err", err)
		}
		return a.printAttached(at)
	}
	if f.reconnect {
		return a.attachAndWatch(ctx, u, opt, ready)
	}
	at, err := (*nbdattach.Attachment)(nil), nbdattach.ErrNoNetlink
	if !f.ioctl {
		at, err = nbdattach.Connect(ctx, u, opt)
	}
	if errors.Is(err, nbdattach.ErrNoNetlink) {
		return nbdattach.ServeIoctl(ctx, u, opt, ready)
	}
	if err != nil {
		return err
	}
	return ready(at)
}

// attachAndWatch attaches an export, or takes over the device that an earlier process
// attached, and serves the device until it is detached.
func (a *app) attachAndWatch(ctx context.Context, u *nbdclient.URI, opt nbdattach.Options, ready func(*nbdattach.Attachment) error) (err error) {
	w, err := nbdattach.NewWatcher(a.log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	get := nbdattach.Connect
	if opt.Index != nbdattach.Any && nbdattach.IsAttached(opt.Index) {
		get = nbdattach.Adopt
	}
	at, err := get(ctx, u, opt)
	if err != nil {
		return err
	}
	if err := ready(at); err != nil {
		return err
	}
	return w.Watch(ctx, at, u, opt)
}

func (a *app) printAttached(at *nbdattach.Attachment) error {
	res := attached{Device: nbdattach.Device(at.Index), Export: at.Info.Name, Size: at.Info.Size, ReadOnly: isReadOnly(at.Info)}
	return a.print(res, func(t *table) {
		mode := "read and write"
		if res.ReadOnly {
			mode = "read-only"
		}
		t.line("%s is %s, %s, %s", res.Device, res.Export, t.bytes(int64(res.Size)), mode)
	})
}

func newDetachCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "detach /dev/nbdN",
		GroupID: groupRead,
		Short:   "Detach a block device from its NBD export",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			index, err := nbdattach.ParseDevice(args[0])
			if err != nil {
				return &usageError{err}
			}
			if err := nbdattach.Disconnect(index); err != nil {
				return err
			}
			return a.print(struct {
				Detached string `json:"detached"`
			}{nbdattach.Device(index)}, func(t *table) { t.line("%s is detached.", nbdattach.Device(index)) })
		},
	}
}

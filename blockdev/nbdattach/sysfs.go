package nbdattach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// sysDir returns the directory in which the kernel shows a device.
func sysDir(index int) string { return filepath.Join("/sys/block", "nbd"+strconv.Itoa(index)) }

// hasDriver reports whether the nbd driver is loaded.
func hasDriver() bool {
	devices, err := os.ReadFile("/proc/devices")
	return err == nil && strings.Contains(string(devices), " nbd\n")
}

// IsAttached reports whether a device has a connection, or waits for one.
func IsAttached(index int) bool { return !isFree(index) }

// isFree reports whether a device has no connection. The kernel shows a pid file
// for one that has.
func isFree(index int) bool {
	_, err := os.Stat(filepath.Join(sysDir(index), "pid"))
	return errors.Is(err, syscall.ENOENT)
}

// AttachedBy returns the ID that the kernel recorded of the thread that attached a device,
// empty for a free one. It stays when that thread has ended, and distinguishes an attachment
// from a later one by another process.
func AttachedBy(index int) string { return readSys(sysDir(index), "pid") }

func readSys(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

const (
	// maxSectorsKB is the largest request: the kernel's default of 128 KiB splits a large
	// read into many.
	maxSectorsKB = 1024
	// oneIOTimeout is Options.IOTimeout with one connection. The kernel keeps a request of a
	// dead connection until this time is over, even if it has a new one (nbd_xmit_timeout);
	// its default is 30 s.
	oneIOTimeout = 5 * time.Second
	// manyIOTimeout is Options.IOTimeout with several: then the kernel also drops a
	// connection on which a request takes longer, and a repository may be slow.
	manyIOTimeout = 30 * time.Second
)

// Tune sets what the kernel's interfaces for NBD do not: how soon requests are sent again
// over a new connection, and how large they are. The device also works without.
func (a *Attachment) Tune(opt Options) error {
	if opt.IOTimeout == 0 {
		opt.IOTimeout = oneIOTimeout
		if a.connections > 1 {
			opt.IOTimeout = manyIOTimeout
		}
	}
	// The kernel uses the time after which a connection is dead for both.
	if opt.Timeout > 0 {
		opt.IOTimeout = opt.Timeout
	}
	if err := tune(filepath.Join(sysDir(a.Index), "queue"), opt.IOTimeout); err != nil {
		return fmt.Errorf("tune %s: %w", Device(a.Index), err)
	}
	return nil
}

func tune(queue string, ioTimeout time.Duration) error {
	sectors := maxSectorsKB
	if n, err := strconv.Atoi(readSys(queue, "max_hw_sectors_kb")); err == nil {
		sectors = min(sectors, n)
	}
	var errs []error
	for name, value := range map[string]int64{"io_timeout": max(ioTimeout.Milliseconds(), 1), "max_sectors_kb": int64(sectors)} {
		f, err := os.OpenFile(filepath.Join(queue, name), os.O_WRONLY|os.O_TRUNC, 0)
		if err == nil {
			_, err = f.WriteString(strconv.FormatInt(value, 10))
			err = errors.Join(err, f.Close())
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

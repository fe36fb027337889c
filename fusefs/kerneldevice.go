package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/disk"
)

// BlockDevices makes block devices of disks that this process serves, by a driver such
// as NBD. Each device has a token that tells its attachment from a later one.
type BlockDevices interface {
	// Attach makes a device. It goes when the last that has it open closes it, so
	// also with this process while only BlockDevice.File has.
	Attach(ctx context.Context, v *DeviceDisk) (*BlockDevice, error)
	// Token is that of what is attached to a device, empty if it is free.
	Token(device string) string
	// Detach takes a device away at once, whoever uses it. One that is free already
	// is no error.
	Detach(device string) error
}

// BlockDevice is an attached device, with its server in this process.
type BlockDevice struct {
	File  *os.File        // the device, open; its name is the device's
	Token string          // see BlockDevices
	Done  <-chan struct{} // closed when the kernel has let go of the device
	// Close ends the server, after the device is detached. File is closed by then.
	Close func() error
}

// DeviceDisk is a volume's bytes for a device: as they are in the recovery point, or
// with an overlay that takes what is written. It is what an NBD server calls an export and
// its writer. Safe for concurrent use.
type DeviceDisk struct {
	Name          string // of the point
	bytes         bytesOf
	over          *overlay.Overlay // nil where nothing can be written
	start, length int64
}

// ReadOnly tells that nothing can be written.
func (d *DeviceDisk) ReadOnly() bool { return d.over == nil }

// Size is in bytes.
func (d *DeviceDisk) Size() int64 { return d.length }

// ReadAt fills p from off.
func (d *DeviceDisk) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return d.bytes.ReadAt(ctx, p, d.start+off) //nolint:wrapcheck // passes through
}

// Extents tells what is data from off on, and what zeroes.
func (d *DeviceDisk) Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error {
	left := d.length - off
	return d.bytes.Extents(ctx, d.start+off, length, func(n int64, hole, zero bool) bool { //nolint:wrapcheck // passes through
		n = min(n, left) // the disk goes on behind the volume
		left -= n
		return n > 0 && yield(n, hole, zero) && left > 0
	})
}

var errNoOverlay = errors.New("this disk cannot be written")

// WriteAt writes to the overlay.
func (d *DeviceDisk) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	if d.over == nil {
		return 0, errNoOverlay
	}
	return d.over.WriteAt(ctx, p, d.start+off) //nolint:wrapcheck // passes through
}

// Flush makes what was written survive a crash of the machine.
func (d *DeviceDisk) Flush(ctx context.Context) error {
	if d.over == nil {
		return nil
	}
	return d.over.Flush(ctx) //nolint:wrapcheck // passes through
}

// Trim forgets a range.
func (d *DeviceDisk) Trim(ctx context.Context, off, length int64) error {
	if d.over == nil {
		return errNoOverlay
	}
	return d.over.Trim(ctx, d.start+off, length) //nolint:wrapcheck // passes through
}

// Zero makes a range read as zeroes.
func (d *DeviceDisk) Zero(ctx context.Context, off, length int64, keepSpace, fast bool) error {
	if d.over == nil {
		return errNoOverlay
	}
	return d.over.Zero(ctx, d.start+off, length, keepSpace, fast) //nolint:wrapcheck // passes through
}

// deviceDisk gives the bytes of a volume. There is an overlay unless the file system is
// known to have a clean journal: a driver writes to any other even for a mount that
// is read-only. One that is kept may hold changes and is always used.
func (p *point) deviceDisk(ctx context.Context, v *disk.Volume) (*DeviceDisk, error) {
	img, err := p.image(ctx)
	if err != nil {
		return nil, err
	}
	d := &DeviceDisk{Name: p.info.Name(), bytes: overlayBase{img}}
	d.start, d.length = v.Locate(0) // on a mirror not where the partition begins
	if vol, err := p.open(v); p.fs.opt.OverlayDir == "" && err == nil && vol.inodes.Info().Log == diskfs.LogClean {
		return d, nil
	}
	if d.over, err = p.overlay(ctx); err != nil {
		return nil, err
	}
	d.bytes = d.over
	return d, nil
}

// onDevice attaches a volume and mounts it at m.Dir.
func (m *KernelMounted) onDevice(ctx context.Context, p *point, v *disk.Volume) error {
	d, err := p.deviceDisk(ctx, v)
	if err != nil {
		return err
	}
	if m.device, err = m.by.Attach(ctx, d); err != nil {
		m.device = nil
		return err //nolint:wrapcheck // says what failed
	}
	m.handle = p.handle()
	// From here on another process can clean up; before, the device goes with this one.
	err = writeDevice(m.Dir, deviceState{device: m.device.File.Name(), token: m.device.Token, pid: os.Getpid()})
	if err == nil {
		err = mountDevice(m.device.File.Name(), v.Type, m.Dir)
	}
	return errors.Join(err, m.device.File.Close())
}

// closeDevice is Close of a mount that stands on a device.
func (m *KernelMounted) closeDevice() error {
	s, err := readDevice(m.Dir)
	// Unmounted by others, the directory may have a mount of another process by now.
	if s == nil || s.token == m.device.Token {
		err = errors.Join(err, unmountKernel(m.Dir, true, m.by), detachDevice(m.Dir, m.by), removeTree(m.Dir))
	}
	err = errors.Join(err, m.device.Close())
	_ = m.handle.Release(context.Background())
	return err
}

// deviceState is what another process has to know of a mount that stands on a device.
type deviceState struct {
	device, token string
	pid           int // who serves it
}

func deviceFile(dir string) string { return kernelTree(dir) + ".device" }

func writeDevice(dir string, s deviceState) error {
	text := fmt.Sprintf("%s %s %d\n", s.device, s.token, s.pid)
	if err := os.WriteFile(deviceFile(dir), []byte(text), 0o600); err != nil {
		return fmt.Errorf("note the device: %w", err)
	}
	return nil
}

// readDevice gives what writeDevice noted, nil if there is nothing.
func readDevice(dir string) (*deviceState, error) {
	b, err := os.ReadFile(deviceFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // nothing is there
	}
	if err != nil {
		return nil, fmt.Errorf("read which device is mounted: %w", err)
	}
	var s deviceState
	if _, err := fmt.Sscan(string(b), &s.device, &s.token, &s.pid); err != nil || !strings.HasPrefix(s.device, "/dev/") {
		return nil, nil //nolint:nilnil,nilerr // cut by a crash of the machine, which ended the device as well
	}
	return &s, nil
}

// deviceOf gives the device that a mount of ours at dir stands on, empty if there is
// none or another attachment has it by now.
func deviceOf(dir string, by BlockDevices) (string, error) {
	s, err := readDevice(dir)
	if s == nil || by == nil || err != nil {
		return "", err
	}
	if token := by.Token(s.device); token != "" && token != s.token {
		return "", nil
	}
	return s.device, nil
}

// detachDevice takes the device of a mount away, and what was noted of it.
func detachDevice(dir string, by BlockDevices) error {
	device, err := deviceOf(dir, by)
	if err != nil {
		return err
	}
	if device != "" && by.Token(device) != "" {
		if err := by.Detach(device); err != nil {
			return err //nolint:wrapcheck // names the device
		}
	}
	if err := os.Remove(deviceFile(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// isServed tells whether the process that serves the device of a mount lives.
func isServed(dir string) (bool, error) {
	s, err := readDevice(dir)
	if s == nil || err != nil {
		return false, err
	}
	source, err := mountSource(dir)
	if err != nil || source != s.device {
		return false, err // unmounted: it is ending
	}
	return unix.Kill(s.pid, 0) == nil, nil
}

package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/blockdev"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// deviceDisk returns a volume as a device's disk. It uses an overlay unless the journal of
// the file system is known to be clean: otherwise a driver writes even for a read-only mount.
// A kept overlay may hold changes and is always used.
func (p *point) deviceDisk(ctx context.Context, v *volumes.Volume) (*blockdev.Disk, error) {
	img, err := p.image(ctx)
	if err != nil {
		return nil, err
	}
	start, length := v.Locate(0) // on a mirror, not the start of the partition
	if vol, err := p.open(ctx, v); p.fs.opt.OverlayDir == "" && err == nil && vol.inodes.Info().Log == diskfs.LogClean {
		return blockdev.NewDisk(p.info.Name(), img, start, length), nil
	}
	over, err := p.overlay(ctx)
	if err != nil {
		return nil, err
	}
	return blockdev.NewDisk(p.info.Name(), over, start, length), nil
}

// onDevice attaches a volume and mounts it at m.Dir.
func (m *KernelMounted) onDevice(ctx context.Context, p *point, v *volumes.Volume) error {
	d, err := p.deviceDisk(ctx, v)
	if err != nil {
		return err
	}
	if m.device, err = m.by.Attach(ctx, d); err != nil {
		m.device = nil
		return err
	}
	m.handle = p.handle()
	// From here on another process can clean up; before, the device ends with this process.
	err = writeDevice(m.Dir, deviceState{device: m.device.File.Name(), token: m.device.Token, pid: os.Getpid()})
	if err == nil {
		err = blockdev.Mount(m.device.File.Name(), v.Type, m.Dir)
	}
	return errors.Join(err, m.device.File.Close())
}

// closeDevice is Close of a mount on a device.
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

// deviceState is what another process has to know of a mount on a device.
type deviceState struct {
	device, token string
	pid           int // of the process that serves it
}

func deviceFile(dir string) string { return kernelTree(dir) + ".device" }

func writeDevice(dir string, s deviceState) error {
	text := fmt.Sprintf("%s %s %d\n", s.device, s.token, s.pid)
	if err := os.WriteFile(deviceFile(dir), []byte(text), 0o600); err != nil {
		return fmt.Errorf("note the device: %w", err)
	}
	return nil
}

// readDevice returns what writeDevice wrote, nil if there is nothing.
func readDevice(dir string) (*deviceState, error) {
	b, err := os.ReadFile(deviceFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // no mount
	}
	if err != nil {
		return nil, fmt.Errorf("read which device is mounted: %w", err)
	}
	var s deviceState
	if _, err := fmt.Sscan(string(b), &s.device, &s.token, &s.pid); err != nil || !strings.HasPrefix(s.device, "/dev/") {
		return nil, nil //nolint:nilerr // cut by a crash of the machine, which ended the device as well
	}
	return &s, nil
}

// deviceOf returns the device of a mount of Varve's at dir, empty if there is none or the
// device belongs to another attachment by now.
func deviceOf(dir string, by blockdev.Driver) (string, error) {
	s, err := readDevice(dir)
	if s == nil || by == nil || err != nil {
		return "", err
	}
	if token := by.Token(s.device); token != "" && token != s.token {
		return "", nil
	}
	return s.device, nil
}

// detachDevice removes the device of a mount, and its record.
func detachDevice(dir string, by blockdev.Driver) error {
	device, err := deviceOf(dir, by)
	if err != nil {
		return err
	}
	if device != "" && by.Token(device) != "" {
		if err := by.Detach(device); err != nil {
			return err
		}
	}
	if err := os.Remove(deviceFile(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// isServed reports whether the process that serves the device of a mount is alive.
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

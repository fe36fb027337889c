package fusefs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs/disk"
)

// Aside does in another process what has the kernel ask this one through FUSE. A thread that
// waits for such an answer cannot be killed: if it was of the process that gives the
// answers, and that was killed meanwhile, both would stay for ever.
type Aside interface {
	// MountLoop calls the function of this name.
	MountLoop(image string, v LoopVolume, dir string) error
	// Unmount calls UnmountKernel, lazily.
	Unmount(dir string) error
}

// LoopVolume is a file system in an image.
type LoopVolume struct {
	Type          string // as mount(8) calls it; empty where that has to find out
	Start, Length int64  // bytes of the image; a length of 0 is to its end
}

func loopVolume(v *disk.Volume) LoopVolume {
	start, length := v.Locate(0) // on a mirror not where the partition begins
	return LoopVolume{Type: v.Type, Start: start, Length: length}
}

// mountLoop calls MountLoop, aside if it can.
func (f *FS) mountLoop(image string, v LoopVolume, dir string) error {
	if f.opt.Aside != nil {
		return f.opt.Aside.MountLoop(image, v, dir) //nolint:wrapcheck // says what failed
	}
	return MountLoop(image, v, dir)
}

// MountLoop mounts a file system of an image through a loop device, read-only; the device can
// be written, for the journal, and goes with the mount.
func MountLoop(image string, v LoopVolume, dir string) error {
	loop, err := attachLoop(image, v)
	if err != nil {
		return err
	}
	defer loop.Close() // the mount keeps it; without one it is free again
	return mountDevice(loop.Name(), v.Type, dir)
}

// loopTries bounds the races for a free loop device with other programs.
const loopTries = 32

func attachLoop(image string, v LoopVolume) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("mounting with the kernel needs loop devices (modprobe loop): %w", err)
	}
	defer control.Close()
	back, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open the disk: %w", err)
	}
	defer back.Close()
	config := unix.LoopConfig{Fd: uint32(back.Fd())} //nolint:gosec // a descriptor
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	copy(config.Info.File_name[:len(config.Info.File_name)-1], image)
	config.Info.Offset, config.Info.Sizelimit = uint64(v.Start), uint64(v.Length) //nolint:gosec // not negative
	for range loopTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE) //nolint:gosec // a descriptor
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("open loop device: %w", err)
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config) //nolint:gosec // a descriptor
		if err == nil {
			return loop, nil
		}
		loop.Close() //nolint:errcheck,gosec // nothing was written
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attach loop device: %w", err)
		}
	}
	return nil, errors.New("attach loop device: other programs take every free one; try again")
}

// loopsOver lists the loop devices whose files lie below a directory, mounted there
// now or once.
func loopsOver(tree string) ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, fmt.Errorf("list loop devices: %w", err)
	}
	var out []string
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // detached meanwhile
		}
		// Once its file system is unmounted the kernel shows a path from its root only.
		file := strings.TrimSuffix(strings.TrimSpace(string(b)), " (deleted)")
		if strings.HasPrefix(file, tree+"/") || strings.HasSuffix(file, "/"+diskName) {
			out = append(out, "/dev/"+strings.Split(name, "/")[3])
		}
	}
	return out, nil
}

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

// mountLoop mounts a volume of an image through a loop device.
func mountLoop(image string, v *disk.Volume, dir string) error {
	loop, err := attachLoop(image, v)
	if err != nil {
		return err
	}
	defer loop.Close() // the mount keeps it; without one it is free again
	return mountDevice(loop.Name(), v, dir)
}

// loopTries bounds the races for a free loop device with other programs.
const loopTries = 32

func attachLoop(image string, v *disk.Volume) (*os.File, error) {
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
	if v.Partition != nil {
		config.Info.Offset = uint64(v.Partition.Start)     //nolint:gosec // not negative
		config.Info.Sizelimit = uint64(v.Partition.Length) //nolint:gosec // not negative
	}
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

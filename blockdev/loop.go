package blockdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// LoopVolume is a file system in an image.
type LoopVolume struct {
	Type          string // as for mount(8); empty to detect it
	Start, Length int64  // bytes of the image; a length of 0 is to its end
}

// MountLoop mounts a file system of an image through a loop device, read-only; the device can
// be written, for the journal, and is removed with the mount.
func MountLoop(image string, v LoopVolume, dir string) error {
	loop, err := attachLoop(image, v)
	if err != nil {
		return err
	}
	defer loop.Close() // the mount keeps it; without a mount it becomes free
	return Mount(loop.Name(), v.Type, dir)
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
	config := unix.LoopConfig{Fd: uint32(back.Fd())}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	copy(config.Info.File_name[:len(config.Info.File_name)-1], image)
	config.Info.Offset, config.Info.Sizelimit = uint64(v.Start), uint64(v.Length)
	for range loopTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("open loop device: %w", err)
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
		if err == nil {
			return loop, nil
		}
		loop.Close() // nothing was written
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attach loop device: %w", err)
		}
	}
	return nil, errors.New("attach loop device: other programs take every free one; try again")
}

// LoopsOver lists the loop devices whose files are below a directory, now or in an earlier
// mount, and have a name.
func LoopsOver(tree, name string) ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, fmt.Errorf("list loop devices: %w", err)
	}
	var out []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // detached since
		}
		// Once its file system is unmounted the kernel shows a path from its root only.
		back := strings.TrimSuffix(strings.TrimSpace(string(b)), " (deleted)")
		if strings.HasPrefix(back, tree+"/") || strings.HasSuffix(back, "/"+name) {
			out = append(out, "/dev/"+strings.Split(file, "/")[3])
		}
	}
	return out, nil
}

package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pageSize is the alignment of memory and, at least, of files for direct I/O. It
// also is the grain of the page cache on most machines.
const pageSize = 4096

// geometry describes a disk.
type geometry struct {
	device bool
	number uint64 // st_rdev of a device
	size   int64
	// block is the logical block size of a device, in bytes; for a file, the
	// alignment that direct I/O needs, or pageSize.
	block int64
	// direct means that direct I/O may work.
	direct bool
}

// measure returns the geometry of an open disk.
func measure(f *os.File) (geometry, error) {
	var st unix.Stat_t
	if err := control(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return geometry{}, fmt.Errorf("stat %s: %w", f.Name(), err)
	}

	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		g := geometry{size: st.Size, block: pageSize, direct: true}
		g.block, g.direct = directAlignment(f, g.block)
		return g, nil
	case unix.S_IFBLK:
		size, err := deviceSize(f)
		if err != nil {
			return geometry{}, err
		}

		block, err := logicalBlockSize(f)
		if err != nil {
			return geometry{}, err
		}
		return geometry{device: true, number: uint64(st.Rdev), size: size, block: block, direct: true}, nil //nolint:unconvert // its type depends on the architecture
	default:
		return geometry{}, fmt.Errorf("%s: %w", f.Name(), ErrNotADisk)
	}
}

// sizeOf returns the current size of an open disk.
func sizeOf(f *os.File, device bool) (int64, error) {
	if device {
		return deviceSize(f)
	}

	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// deviceSize asks BLKGETSIZE64.
func deviceSize(f *os.File) (int64, error) {
	var size uint64

	if err := ioctl(f, unix.BLKGETSIZE64, unsafe.Pointer(&size)); err != nil {
		return 0, fmt.Errorf("ask %s for its size: %w", f.Name(), err)
	}

	if size > math.MaxInt64 {
		return 0, fmt.Errorf("%s has %d bytes: disks of 8 EiB and more are not supported", f.Name(), size)
	}
	return int64(size), nil
}

// logicalBlockSize asks BLKSSZGET.
func logicalBlockSize(f *os.File) (int64, error) {
	var block int

	err := control(f, func(fd int) (err error) {
		block, err = unix.IoctlGetInt(fd, unix.BLKSSZGET)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("ask %s for its block size: %w", f.Name(), err)
	}

	// Blocks are powers of two from 512 up; the kernel allows none above 64 KiB.
	if block < 512 || block > 1<<20 || block&(block-1) != 0 {
		return 0, fmt.Errorf("ask %s for its block size: %d bytes is impossible", f.Name(), block)
	}
	return int64(block), nil
}

// directAlignment asks the file system what direct I/O on a file needs (statx, since
// Linux 6.1), and whether there is any. Unknown: fallback, and try.
func directAlignment(f *os.File, fallback int64) (int64, bool) {
	var st unix.Statx_t

	err := control(f, func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	})
	if err != nil || st.Mask&unix.STATX_DIOALIGN == 0 {
		return fallback, true
	}

	align := int64(st.Dio_offset_align)
	if align == 0 || st.Dio_mem_align > pageSize || align&(align-1) != 0 || align > 1<<20 {
		return fallback, false
	}
	return align, true
}

// ioctl passes a pointer that the kernel reads or fills during the call.
func ioctl(f *os.File, request uint, argument unsafe.Pointer) error {
	return control(f, func(fd int) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(argument))
		if errno != 0 {
			return errno
		}
		return nil
	})
}

// control runs a system call on f while f cannot be closed, and repeats it if interrupted.
func control(f *os.File, call func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}

	var result error

	if err := raw.Control(func(fd uintptr) {
		for {
			if result = call(int(fd)); !errors.Is(result, unix.EINTR) {
				return
			}
		}
	}); err != nil {
		return err
	}
	return result
}

// checkKind refuses what is not a disk before it is opened: opening a pipe would wait for a
// writer, opening a tape would move it.
func checkKind(path string) (fs.FileInfo, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}

	kind := info.Mode().Type()
	if kind == 0 || kind&fs.ModeDevice != 0 && kind&fs.ModeCharDevice == 0 {
		return info, nil
	}
	return nil, fmt.Errorf("%s is a %s: %w", path, kindName(kind), ErrNotADisk)
}

func kindName(kind fs.FileMode) string {
	switch {
	case kind&fs.ModeDir != 0:
		return "directory; name the block device or image file, not the place where it is mounted"
	case kind&fs.ModeCharDevice != 0:
		return "character device"
	case kind&fs.ModeNamedPipe != 0:
		return "pipe"
	case kind&fs.ModeSocket != 0:
		return "socket"
	default:
		return "special file"
	}
}

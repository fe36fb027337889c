package disk

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Block device requests of linux/fs.h that x/sys/unix has no wrapper for.
const (
	blkGetSize64 = 0x80081272 // BLKGETSIZE64
	blkZeroOut   = 0x127f     // BLKZEROOUT
)

func deviceSize(f *os.File) (int64, error) {
	var n uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), blkGetSize64, uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		return 0, fmt.Errorf("size of %s: %w", f.Name(), errno)
	}
	if n > 1<<62 {
		return 0, fmt.Errorf("size of %s: %d bytes", f.Name(), n)
	}
	return int64(n), nil
}

func zeroOut(f *os.File, off, length int64) error {
	r := [2]uint64{uint64(off), uint64(length)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), blkZeroOut, uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return errno
	}
	return nil
}

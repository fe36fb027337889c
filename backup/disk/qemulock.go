package disk

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// QEMU marks how it uses an image file, of any format, by locks on single bytes of it
// (block/file-posix.c, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE): a process locks byte
// 100+P if it has the permission P, byte 200+P if it does not share P. Permissions are
// consistent reads (0), writes (1) and a change of size (3). A virtual machine that writes
// holds 101, a reader 100, 201 and 203. They are OFD locks, all of them shared.
const (
	lockReads  = 100
	lockWrites = 101
	noWrites   = 201
	noResize   = 203
)

// qemuUse reports how QEMU uses the image file, as far as its file system has locks.
func qemuUse(f *os.File) (used, writes bool) {
	held := func(b int64) bool {
		lock := unix.Flock_t{Type: unix.F_WRLCK, Start: b, Len: 1}
		err := control(f, func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lock) })
		return err == nil && lock.Type != unix.F_UNLCK
	}
	writes = held(lockWrites)
	return writes || held(lockReads) || held(noWrites), writes
}

// readAsQEMU marks a file as read, as QEMU does: no virtual machine starts on it until it is
// closed. It fails only if one writes to it.
func readAsQEMU(f *os.File) error {
	for _, b := range []int64{lockReads, noWrites, noResize} {
		lock := unix.Flock_t{Type: unix.F_RDLCK, Start: b, Len: 1}
		err := control(f, func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock) })
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return nil // a file system without such locks
		}
	}
	if _, writes := qemuUse(f); writes { // it checked before this lock
		return unix.EWOULDBLOCK
	}
	return nil
}

// qemu looks for users among QEMU's programs.
func (s *survey) qemu(path string) {
	f, err := os.Open(path)
	if err != nil {
		return // opening it will report the error
	}
	defer f.Close()
	if used, writes := qemuUse(f); used {
		s.add(Use{Kind: Opened, Device: path, ReadOnly: !writes})
	}
}

package source

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/internal/bytesize"
)

// scratch is the directory of one machine for the images that take what the guest overwrites
// while a backup reads. QEMU may run as another user, which gets the images, and cannot make
// names beside them: this process, which may be root, writes there.
type scratch struct {
	dir      string
	uid, gid int   // of QEMU; -1 if not known
	reserve  int64 // free bytes below which a backup is ended
}

// Below this much free space a backup ends, before the guest's writes fail: a fast disk fills
// it in half a second. A small file system keeps a part of what it had.
const (
	scratchReserve = 1 << 30
	scratchPart    = 8
)

// openScratch makes the directory, empty. The machine's lock is held.
func openScratch(parent, key string, uid, gid int) (*scratch, error) {
	if parent == "" {
		parent = DefaultScratch
	}
	s := &scratch{dir: filepath.Join(parent, "varve-"+key), uid: uid, gid: gid}
	if err := ownDir(s.dir, 0o711); err != nil {
		return nil, fmt.Errorf("scratch directory: %w; --scratch names another", err)
	}
	if err := s.clear(); err != nil {
		return nil, err
	}
	free, err := s.free()
	if err != nil {
		return nil, err
	}
	s.reserve = min(scratchReserve, free/scratchPart)
	return s, nil
}

// give hands a file to the user that QEMU runs as.
func give(path string, uid, gid int) error {
	if uid < 0 || uid == os.Getuid() {
		return nil
	}
	if err := os.Lchown(path, uid, gid); err != nil {
		return fmt.Errorf("QEMU runs as user %d: %w; run varve as that user, or as root", uid, err)
	}
	return nil
}

// image makes an image of size bytes that QEMU can write to.
func (s *scratch) image(ctx context.Context, name string, size int64) (path string, err error) {
	path = filepath.Join(s.dir, name+".qcow2")
	if err := qemu.Create(ctx, path, qemu.QCOW2, size); err != nil {
		return "", fmt.Errorf("scratch directory %s: %w", s.dir, err)
	}
	return path, errors.Join(os.Chmod(path, 0o600), give(path, s.uid, s.gid))
}

// free is how much room there is, in bytes.
func (s *scratch) free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, fmt.Errorf("scratch directory %s: %w", s.dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// check fails with ErrScratchFull where the room is getting too small.
func (s *scratch) check() error {
	free, err := s.free()
	if err != nil {
		return err
	}
	return checkRoom(filepath.Dir(s.dir), free, s.reserve)
}

// checkRoom fails with ErrScratchFull where a directory has less room than it has to have.
func checkRoom(dir string, free, reserve int64) error {
	if free >= reserve {
		return nil
	}
	return fmt.Errorf("%w: %s has %s left; no point was made, and the guest was not affected; --scratch names a directory with more room",
		ErrScratchFull, dir, bytesize.Exact(free))
}

// clear removes what is in the directory.
func (s *scratch) clear() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (s *scratch) close() error { return os.RemoveAll(s.dir) }

package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// scratchPrefix begins the names of scratch directories.
const scratchPrefix = "varve-overlay-"

// scratchGrace is the age below which a scratch directory that nobody has locked may
// be one that is just being made.
const scratchGrace = time.Minute

// Scratch is a temporary directory for overlays that end with their process. It is
// locked while it is in use, so that what a killed process left can be told and
// taken away.
type Scratch struct {
	Dir  string
	lock *os.File // the directory
}

// largeTemporary is for temporary files that may be large: not a tmpfs, as /tmp may be, where
// an overlay would fill the memory (file-hierarchy(7)).
const largeTemporary = "/var/tmp"

// ScratchParent is where scratch directories lie that nobody gave another place: the user's
// $TMPDIR, else /var/tmp, else, on a machine without, the directory for temporary files.
func ScratchParent() string {
	if dir := os.Getenv("TMPDIR"); dir != "" {
		return dir
	}
	if st, err := os.Stat(largeTemporary); err == nil && st.IsDir() {
		return largeTemporary
	}
	return os.TempDir()
}

// NewScratch makes a directory in parent, and takes away what killed processes of
// this user left there.
func NewScratch(parent string) (*Scratch, error) {
	err := sweepScratch(parent)
	dir, mkdirErr := os.MkdirTemp(parent, scratchPrefix)
	if mkdirErr != nil {
		return nil, fmt.Errorf("make directory for overlays: %w", mkdirErr)
	}
	lock, lockErr := lockScratch(dir)
	if err = errors.Join(err, lockErr); err != nil {
		if lock != nil {
			err = errors.Join(err, lock.Close())
		}
		return nil, errors.Join(fmt.Errorf("directory for overlays: %w", err), os.Remove(dir))
	}
	return &Scratch{Dir: dir, lock: lock}, nil
}

// Close removes the directory with all that is in it.
func (s *Scratch) Close() error {
	if err := errors.Join(os.RemoveAll(s.Dir), s.lock.Close()); err != nil {
		return fmt.Errorf("remove directory for overlays: %w", err)
	}
	return nil
}

// lockScratch opens and locks a directory; EWOULDBLOCK if another process has it.
func lockScratch(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the path itself
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil { //nolint:gosec // a descriptor
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	return f, nil
}

// sweepScratch removes the directories in parent that no process has locked.
func sweepScratch(parent string) error {
	dirs, err := filepath.Glob(filepath.Join(parent, scratchPrefix+"*"))
	if err != nil {
		return fmt.Errorf("look for old overlays: %w", err)
	}
	for _, dir := range dirs {
		var st unix.Stat_t
		if unix.Lstat(dir, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() ||
			time.Since(time.Unix(st.Mtim.Sec, st.Mtim.Nsec)) < scratchGrace { //nolint:unconvert // narrower on other machines
			continue
		}
		lock, err := lockScratch(dir)
		if err != nil {
			continue // in use, or gone meanwhile
		}
		if err := errors.Join(os.RemoveAll(dir), lock.Close()); err != nil {
			return fmt.Errorf("take away an old overlay: %w", err)
		}
	}
	return nil
}

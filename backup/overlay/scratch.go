package overlay

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	// scratchPrefix begins the names of scratch directories.
	scratchPrefix = "varve-overlay-"
	// scratchMark is the file that makes a directory a scratch directory. A name
	// alone proves nothing: users name directories, too.
	scratchMark = ".varve-scratch"
)

// markText is the content of the mark in a directory of this name. A copy of the
// directory, or one that was renamed to keep it, does not match.
func markText(name string) string {
	return "Varve made the scratch directory " + name + " and deletes it with all its content when no process uses it.\n"
}

// Scratch is a temporary directory for data that ends with its process. It is marked
// as ours and locked while it is in use, so that what a killed process left can be
// found and deleted.
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

// NewScratch makes a directory in parent, and deletes what killed processes of this
// user left there.
func NewScratch(parent string) (*Scratch, error) {
	if err := sweepScratch(parent); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(parent, scratchPrefix)
	if err != nil {
		return nil, fmt.Errorf("make a scratch directory: %w", err)
	}
	// The lock comes before the mark: a marked directory without a lock is one that
	// its process left.
	lock, err := lockDir(dir, unix.LOCK_SH)
	if err == nil {
		if err = os.WriteFile(filepath.Join(dir, scratchMark), []byte(markText(filepath.Base(dir))), 0o600); err == nil {
			return &Scratch{Dir: dir, lock: lock}, nil
		}
		_ = lock.Close()
	}
	return nil, errors.Join(fmt.Errorf("make a scratch directory: %w", err), os.RemoveAll(dir))
}

// Close removes the directory with all that is in it.
func (s *Scratch) Close() error {
	if err := errors.Join(removeMarked(s.Dir), s.lock.Close()); err != nil {
		return fmt.Errorf("remove the scratch directory %s: %w", s.Dir, err)
	}
	return nil
}

// removeMarked removes a scratch directory, the mark last: what a kill leaves of it is
// still marked.
func removeMarked(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		if e.Name() != scratchMark {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// lockDir opens a directory and locks it, shared (unix.LOCK_SH) or alone
// (unix.LOCK_EX). The error is ErrInUse if another lock is in the way.
func lockDir(dir string, how int) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the path itself
	}
	err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB) //nolint:gosec // a descriptor
	if err == nil {
		return f, nil
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrInUse
	}
	return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
}

// isMarked reports whether an open directory of this name is a scratch directory of
// this user.
func isMarked(dir *os.File) bool {
	var st unix.Stat_t
	if unix.Fstat(int(dir.Fd()), &st) != nil || int(st.Uid) != os.Geteuid() { //nolint:gosec // a descriptor
		return false
	}
	fd, err := unix.Openat(int(dir.Fd()), scratchMark, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0) //nolint:gosec // a descriptor
	if err != nil {
		return false
	}
	f := os.NewFile(uintptr(fd), scratchMark) //nolint:gosec // a descriptor
	defer f.Close()
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() {
		return false
	}
	want := markText(filepath.Base(dir.Name()))
	got, err := io.ReadAll(io.LimitReader(f, int64(len(want))+1))
	return err == nil && string(got) == want
}

// sweepScratch removes the scratch directories in parent that no process uses.
func sweepScratch(parent string) error {
	dirs, err := filepath.Glob(filepath.Join(globLiteral(parent), scratchPrefix+"*"))
	if err != nil {
		return fmt.Errorf("look for old scratch directories: %w", err)
	}
	for _, dir := range dirs {
		lock, err := lockDir(dir, unix.LOCK_SH)
		if err != nil {
			continue // no directory, somebody else's, or gone meanwhile
		}
		// Only a marked one is locked alone: others may be in use by people who do not
		// expect to be kept out.
		if isMarked(lock) && unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil && isMarked(lock) { //nolint:gosec // a descriptor
			err = removeMarked(dir)
		}
		if err = errors.Join(err, lock.Close()); err != nil {
			return fmt.Errorf("delete an old scratch directory: %w", err)
		}
	}
	return nil
}

// globLiteral quotes a path for filepath.Glob.
func globLiteral(path string) string {
	var b []byte
	for i := range len(path) {
		switch path[i] {
		case '*', '?', '[', '\\':
			b = append(b, '\\')
		}
		b = append(b, path[i])
	}
	return string(b)
}

// Dir is a lock on a directory of overlays that a user named. While it is held no
// other process takes the directory for scratch data.
type Dir struct{ lock *os.File }

// TakeDir makes a directory for overlays if it does not exist, and locks it. A scratch
// directory that a killed process left is the user's from now on. The error is
// ErrInUse for one that its process still uses. Several processes may hold the same
// directory: each overlay in it has a lock of its own.
func TakeDir(dir string) (*Dir, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of overlays: %w", err)
	}
	d, err := HoldDir(dir)
	if err != nil || !isMarked(d.lock) {
		return d, err
	}
	fd := int(d.lock.Fd()) //nolint:gosec // a descriptor
	if err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%s is the scratch directory of a running process: %w", dir, ErrInUse)
	}
	if err == nil {
		err = os.Remove(filepath.Join(d.lock.Name(), scratchMark))
	}
	if err == nil {
		err = unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("take over the directory of overlays: %w", err), d.Close())
	}
	return d, nil
}

// HoldDir locks a directory of overlays and leaves it what it is.
func HoldDir(dir string) (*Dir, error) {
	path, err := filepath.EvalSymlinks(dir)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return nil, fmt.Errorf("find the directory of overlays: %w", err)
	}
	lock, err := lockDir(path, unix.LOCK_SH)
	if err != nil {
		return nil, fmt.Errorf("directory of overlays: %w", err)
	}
	return &Dir{lock}, nil
}

// Close gives the lock back.
func (d *Dir) Close() error {
	if d == nil {
		return nil
	}
	return d.lock.Close() //nolint:wrapcheck // names the path itself
}

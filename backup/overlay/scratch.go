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
	// scratchMark is the file that marks a scratch directory. A name alone proves nothing:
	// users name directories, too.
	scratchMark = ".varve-scratch"
)

// markText returns the content of the mark for a directory of this name. A copy of the
// directory, or a renamed one, does not match.
func markText(name string) string {
	return "Varve made the scratch directory " + name + " and deletes it with all its content when no process uses it.\n"
}

// Scratch is a temporary directory for data that is deleted with its process. It is marked
// and locked while in use, so that what a killed process left can be found and deleted.
type Scratch struct {
	Dir  string
	lock *os.File // the directory
}

// largeTemporary is the directory for large temporary files: not a tmpfs, as /tmp may be,
// where an overlay would fill the memory (file-hierarchy(7)).
const largeTemporary = "/var/tmp"

// ScratchParent returns the default parent of scratch directories: $TMPDIR, else /var/tmp,
// else, if that does not exist, the directory for temporary files.
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
	// The lock comes before the mark: a marked directory without a lock was left by a dead
	// process.
	lock, err := lockDir(dir, unix.LOCK_SH)
	if err == nil {
		if err = os.WriteFile(filepath.Join(dir, scratchMark), []byte(markText(filepath.Base(dir))), 0o600); err == nil {
			return &Scratch{Dir: dir, lock: lock}, nil
		}
		_ = lock.Close()
	}
	return nil, errors.Join(fmt.Errorf("make a scratch directory: %w", err), os.RemoveAll(dir))
}

// Close removes the directory and its content.
func (s *Scratch) Close() error {
	if err := errors.Join(removeMarked(s.lock), s.lock.Close()); err != nil {
		return fmt.Errorf("remove the scratch directory %s: %w", s.Dir, err)
	}
	return nil
}

// removeMarked removes an open scratch directory, the mark last: what a kill leaves of it is
// still marked. Nothing outside it is touched, even if its path is replaced during that.
func removeMarked(dir *os.File) error {
	root, err := os.OpenRoot(dir.Name())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	was, err := dir.Stat()
	if err != nil {
		return err
	}
	now, err := root.Stat(".")
	if err != nil {
		return err
	}
	if !os.SameFile(was, now) {
		return fmt.Errorf("%s was replaced; nothing in it was removed", dir.Name())
	}
	entries, err := fs.ReadDir(root.FS(), ".")
	errs := []error{err}
	for _, e := range entries {
		if e.Name() != scratchMark {
			errs = append(errs, root.RemoveAll(e.Name()))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := root.RemoveAll(scratchMark); err != nil {
		return err
	}
	return os.Remove(dir.Name())
}

// lockDir opens a directory and locks it, shared (unix.LOCK_SH) or exclusively
// (unix.LOCK_EX). The error is ErrInUse if another lock conflicts.
func lockDir(dir string, how int) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
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
	if unix.Fstat(int(dir.Fd()), &st) != nil || int(st.Uid) != os.Geteuid() {
		return false
	}
	fd, err := unix.Openat(int(dir.Fd()), scratchMark, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	f := os.NewFile(uintptr(fd), scratchMark)
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
			continue // not a directory, another user's, or deleted since
		}
		// Only a marked directory is locked exclusively: users of another may not expect to
		// be locked out.
		if isMarked(lock) && unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil && isMarked(lock) { //nolint:gosec // a descriptor
			err = removeMarked(lock)
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

// Dir is a lock on a directory of overlays that a user named. While it is held no other
// process treats the directory as scratch data.
type Dir struct{ lock *os.File }

// TakeDir makes a directory for overlays if it does not exist, and locks it. A scratch
// directory that a killed process left becomes the user's. The error is ErrInUse if its
// process still uses it. Several processes may hold the same directory: each overlay in it
// has its own lock.
func TakeDir(dir string) (*Dir, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of overlays: %w", err)
	}
	d, err := HoldDir(dir)
	if err != nil || !isMarked(d.lock) {
		return d, err
	}
	fd := int(d.lock.Fd())
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

// HoldDir locks a directory of overlays without changing it.
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

// Close releases the lock.
func (d *Dir) Close() error {
	if d == nil {
		return nil
	}
	return d.lock.Close()
}

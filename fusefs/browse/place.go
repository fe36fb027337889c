package browse

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// place is a path of the target as its open directory and its name there: whatever becomes of
// the directories above meanwhile, all that is done at one place is done in one directory.
type place struct {
	dir  int
	name string
	path string // for errors
}

// at calls fn with a place in the target. Each directory on the way is opened without
// following links: one that became a link must not lead elsewhere.
func (c *copier) at(to string, fn func(p place) error) error {
	p := place{dir: int(c.base.Fd()), name: filepath.Base(to), path: filepath.Join(c.base.Name(), to)}
	if dir := filepath.Dir(to); dir != "." {
		for elem := range strings.SplitSeq(dir, "/") {
			next, err := openat(p.dir, elem, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
			if p.dir != int(c.base.Fd()) {
				unix.Close(p.dir)
			}
			if err != nil {
				return &fs.PathError{Op: "open", Path: filepath.Join(c.base.Name(), dir), Err: err}
			}
			p.dir = next
		}
		defer func() { unix.Close(p.dir) }()
	}
	return fn(p)
}

// err names the place of an error.
func (p place) err(op string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: p.path, Err: err}
}

func (p place) lstat() (st unix.Stat_t, err error) {
	err = p.err("lstat", uninterrupted(func() error { return unix.Fstatat(p.dir, p.name, &st, unix.AT_SYMLINK_NOFOLLOW) }))
	return st, err
}

// create makes a file for writing.
func (p place) create() (*os.File, error) {
	fd, err := openat(p.dir, p.name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, p.err("open", err)
	}
	return os.NewFile(uintptr(fd), p.path), nil
}

func (p place) remove() error { return p.unlink(0) }

func (p place) unlink(flags int) error {
	return p.err("remove", uninterrupted(func() error { return unix.Unlinkat(p.dir, p.name, flags) }))
}

// uninterrupted calls fn again as long as a signal interrupts it, as package os does: Go's runtime sends signals to its
// own threads, and file systems in user space end a call for them.
func uninterrupted(fn func() error) error {
	for {
		if err := fn(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func openat(dir int, name string, flags int, mode uint32) (fd int, err error) {
	err = uninterrupted(func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode)
		return err
	})
	return fd, err
}

// makings are the files and directories that a copy has made or writes into, by device and
// inode: a target may take two names of the image for one, as where case does not count.
type makings struct {
	mu  sync.Mutex
	all map[inodes]uint64
}

// inodes are 64 neighbouring inodes, which share a word.
type inodes struct{ dev, word uint64 }

func (m *makings) add(st *unix.Stat_t) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addLocked(st)
}

func (m *makings) addLocked(st *unix.Stat_t) {
	if m.all == nil {
		m.all = map[inodes]uint64{}
	}
	m.all[inodes{st.Dev, st.Ino / 64}] |= 1 << (st.Ino % 64)
}

// mkdir makes a directory, or takes one that is there, writable until it is complete.
func (c *copier) mkdir(to string) error {
	return c.at(to, func(p place) error {
		// With the lock, since nothing may remove it before it is known.
		c.makings.mu.Lock()
		defer c.makings.mu.Unlock()
		err := p.err("mkdir", uninterrupted(func() error { return unix.Mkdirat(p.dir, p.name, 0o700) }))
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		st, lerr := p.lstat()
		switch {
		case lerr != nil:
			return errors.Join(err, lerr)
		case st.Mode&unix.S_IFMT != unix.S_IFDIR && err != nil:
			return err
		case st.Mode&unix.S_IFMT != unix.S_IFDIR:
			return p.err("mkdir", unix.ENOTDIR)
		}
		if c.opt.Force {
			c.makings.addLocked(&st)
		}
		return nil
	})
}

// replace removes what is in the way of a file, unless it is of this copy: a file that took
// the place of a directory would be where others of the copy are still written.
func (c *copier) replace(p place) error {
	c.makings.mu.Lock()
	st, err := p.lstat()
	mine := err == nil && c.makings.all[inodes{st.Dev, st.Ino / 64}]>>(st.Ino%64)&1 != 0
	if err == nil && !mine && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = p.unlink(unix.AT_REMOVEDIR)
		c.makings.mu.Unlock()
		return err
	}
	c.makings.mu.Unlock()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case mine:
		return reading(fmt.Errorf("%s is of this copy already, and is not replaced", p.path))
	}
	if err := p.remove(); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// keep sets the owner, attributes, mode and times of a file as in the image. Owner first,
// since it clears set-ID bits; times last.
func (c *copier) keep(e *Entry, p place) error {
	attrs, err := e.Xattrs()
	if err != nil {
		if err := c.failed(e.Path, "", reading(&PartialError{Missing: "attributes", Err: err})); err != nil {
			return err
		}
	}
	// A descriptor that follows no link, since the mode must not become that of what a link
	// leads to. It is checked, as another may have taken the place of what was made.
	fd, err := openat(p.dir, p.name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return p.err("open", err)
	}
	defer unix.Close(fd)
	var is unix.Stat_t
	if err := unix.Fstat(fd, &is); err != nil {
		return p.err("stat", err)
	}
	st := e.Stat
	if is.Mode&unix.S_IFMT != st.Mode&unix.S_IFMT {
		return reading(fmt.Errorf("%s: something else is at %s now; its mode, owner and attributes are not set", e.Path, p.path))
	}
	if c.opt.Force && !e.IsDir() {
		c.makings.add(&is)
	}
	if err := unix.Fchownat(fd, "", int(st.UID), int(st.GID), unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if os.Geteuid() == 0 {
			c.warned(e.Path, fmt.Errorf("owner %d:%d: %w", st.UID, st.GID, err))
		}
		c.ownersLost.Add(1)
	}
	mode, lost := st.Mode&0o7777, false
	if !c.opt.SetID && !e.IsDir() && mode&0o6000 != 0 { // a directory's only sets the group of new files
		mode, lost = mode&^0o6000, true
	}
	if os.Geteuid() != 0 && (int(st.UID) != os.Geteuid() || int(st.GID) != os.Getegid()) {
		mode &^= 0o6000 // another's set-ID program must not get this user's rights
	}
	// The path of the descriptor leads to the file itself, also if that is a link.
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	for _, a := range attrs {
		if a.Name == "security.capability" && !c.opt.SetID {
			lost = true
			continue
		}
		if err := unix.Setxattr(self, a.Name, a.Value, 0); err != nil {
			c.warned(e.Path, fmt.Errorf("attribute %s: %w", a.Name, err))
		}
	}
	if lost {
		c.setIDLost.Add(1)
	}
	if is.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Chmod(self, mode); err != nil {
			c.warned(e.Path, fmt.Errorf("mode %o: %w", mode, err))
		}
	}
	times := []unix.Timespec{timespec(st.Atime), timespec(st.Mtime)}
	if err := unix.UtimesNanoAt(p.dir, p.name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		c.warned(e.Path, fmt.Errorf("times: %w", err))
	}
	return nil
}

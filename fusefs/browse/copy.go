package browse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// CopyOptions say how to copy.
type CopyOptions struct {
	// Recursive copies directories with their content.
	Recursive bool
	// Force replaces existing files.
	Force bool
	// Devices makes the device nodes of the image. They give access to this machine's
	// devices, by the modes in the image.
	Devices bool
	// SetID keeps the set-user-ID and set-group-ID bits and the capabilities of files, by
	// which a program of the image gets rights on this machine.
	SetID bool
	// Workers copy files concurrently; 0 for twice the processors.
	Workers int
	// Copied is called with the number of bytes written, from any goroutine.
	Copied func(n int64)
	// Warn is called, from any goroutine, with what could not be kept of a copied file: an
	// owner without root, an attribute that the target refuses.
	Warn func(name string, err error)
	// Failed, if set, is called for each file and directory that cannot be read, one at a
	// time but from any goroutine; if it returns nil the copy continues. A file that can be
	// read in part is copied in part, and the error then has a *PartialError; nothing of any
	// other stays in the target. A failed write always ends the copy.
	Failed func(name string, err error) error
}

// unreadable is an error of the image, not of the target.
type unreadable struct{ err error }

func (e *unreadable) Error() string { return e.err.Error() }
func (e *unreadable) Unwrap() error { return e.err }

// reading marks an error as one of the image.
func reading(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return &unreadable{err}
}

// incomplete describes the damage of a directory, which is copied but may lack entries.
func incomplete(name string, err error) error {
	var at *fs.PathError
	if errors.As(err, &at) && at.Op == "readdir" && at.Path == name {
		return &PartialError{Missing: "some entries of the directory", Err: err}
	}
	return err
}

// CopyResult counts what was copied.
type CopyResult struct {
	Files int64 `json:"files"` // without directories
	Dirs  int64 `json:"directories"`
	Bytes int64 `json:"bytes"` // data; holes stay holes
	// OwnersLost counts files and directories that now belong to the copying user, since only
	// root can give files away.
	OwnersLost int64 `json:"ownersLost,omitempty"`
	// DevicesLeft counts skipped device nodes, and SetIDLost files without their set-ID bits
	// or capabilities, both for want of the option.
	DevicesLeft int64 `json:"devicesLeft,omitempty"`
	SetIDLost   int64 `json:"setIDLost,omitempty"`
}

// Add adds the counts of another copy.
func (r *CopyResult) Add(o CopyResult) {
	r.Files, r.Dirs, r.Bytes = r.Files+o.Files, r.Dirs+o.Dirs, r.Bytes+o.Bytes
	r.OwnersLost, r.DevicesLeft, r.SetIDLost = r.OwnersLost+o.OwnersLost, r.DevicesLeft+o.DevicesLeft, r.SetIDLost+o.SetIDLost
}

// Copy copies a file, or a directory with its content, out of an image to a path that does
// not exist, or to a directory with another such tree in it. It keeps modes, owners, times,
// extended attributes, hard links, special files and holes as far as this process may; device
// nodes and set-ID bits if the options say so.
//
// Nothing is written outside the target, whatever the image contains: diskfs checks names,
// directories are opened one below the other without following links, and links are made,
// never followed.
func Copy(ctx context.Context, fsys diskfs.FileSystem, name, target string, opt CopyOptions) (CopyResult, error) {
	if opt.Workers <= 0 {
		opt.Workers = 2 * runtime.GOMAXPROCS(0)
	}
	dir, err := os.Open(filepath.Dir(target))
	if err != nil {
		return CopyResult{}, fmt.Errorf("copy to %s: %w", target, err)
	}
	defer dir.Close()
	c := &copier{fsys: fsys, base: dir, opt: opt, links: map[uint64]string{}, missing: map[string]bool{}, refused: map[string]error{}}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(opt.Workers)
	c.group, c.ctx = g, gctx
	base := filepath.Base(target)
	err = Walk(gctx, fsys, name, func(e *Entry) error {
		rel := strings.TrimPrefix(e.Path, name)
		if name == "." && e.Path != "." {
			rel = "/" + e.Path
		}
		return c.add(e, base+rel)
	}, func(name string, err error) error { return c.failed(name, "", reading(incomplete(name, err))) })
	if failed := g.Wait(); failed != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = failed
	}
	if err == nil {
		err = c.finish()
	}
	return CopyResult{Files: c.files.Load(), Dirs: int64(len(c.dirs)), Bytes: c.bytes.Load(),
		OwnersLost: c.ownersLost.Load(), DevicesLeft: c.devicesLeft.Load(), SetIDLost: c.setIDLost.Load()}, err
}

type copier struct {
	fsys  diskfs.FileSystem
	base  *os.File // the directory that the target is in
	opt   CopyOptions
	group *errgroup.Group
	ctx   context.Context // of one copy

	files, bytes, ownersLost, devicesLeft, setIDLost atomic.Int64

	dirs  []made // their metadata is set last, since writing into them changes it
	later []made // hard links, after their first name
	links map[uint64]string

	makings makings // only with Force

	telling sync.Mutex       // one at a time; guards the following
	missing map[string]bool  // target paths of files that could not be read
	refused map[string]error // and of special files not made, with the reason
}

// failed decides whether the copy continues after an error; to is the target path of the
// missing file.
func (c *copier) failed(name, to string, err error) error {
	var source *unreadable
	if c.opt.Failed == nil || !errors.As(err, &source) {
		return err
	}
	c.telling.Lock()
	defer c.telling.Unlock()
	if to != "" {
		c.missing[to] = true
	}
	return c.opt.Failed(name, source.err)
}

// made is something at its path in the target.
type made struct {
	entry *Entry
	to    string
	first string // of a hard link: the name to link to
}

func (c *copier) add(e *Entry, to string) error {
	if e.IsDir() {
		if !c.opt.Recursive {
			return fmt.Errorf("/%s is a directory: use --recursive", strings.TrimPrefix(e.Path, "."))
		}
		if err := c.mkdir(to); err != nil {
			return fmt.Errorf("copy: %w", err)
		}
		c.dirs = append(c.dirs, made{entry: e, to: to})
		return nil
	}
	if e.Stat.Nlink > 1 {
		if first, ok := c.links[e.Stat.Ino]; ok {
			c.later = append(c.later, made{entry: e, to: to, first: first})
			return nil
		}
		c.links[e.Stat.Ino] = to
	}
	c.group.Go(func() error { return c.failed(e.Path, to, c.file(e, to)) })
	return nil
}

// file makes anything but a directory.
func (c *copier) file(e *Entry, to string) error {
	if e.Info.Mode()&fs.ModeDevice != 0 && !c.opt.Devices {
		c.devicesLeft.Add(1)
		c.refuse(e, to, errDevice)
		return nil
	}
	return c.at(to, func(p place) error {
		if c.opt.Force {
			if err := c.replace(p); err != nil {
				return fmt.Errorf("copy %s: %w", e.Path, err)
			}
		}
		var err error
		switch e.Info.Mode().Type() {
		case 0:
			err = c.content(e, p)
		case fs.ModeSymlink:
			var target string
			if target, err = e.ReadLink(); err != nil {
				err = reading(err)
			} else {
				err = p.err("symlink", uninterrupted(func() error { return unix.Symlinkat(target, p.dir, p.name) }))
			}
		default:
			if err = p.err("mknod", special(e.Stat, p)); errors.Is(err, unix.EPERM) {
				c.refuse(e, to, errRefused)
				return nil
			}
		}
		if err != nil {
			if errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("%s is in the way of %s (%w): use --force to replace files", p.path, e.Path, fs.ErrExist)
			}
			return fmt.Errorf("copy %s: %w", e.Path, err)
		}
		c.files.Add(1)
		return c.keep(e, p)
	})
}

// refuse skips a special file, and with it its other names.
func (c *copier) refuse(e *Entry, to string, why error) {
	c.telling.Lock()
	c.refused[to] = why
	c.telling.Unlock()
	c.warned(e.Path, why)
}

// special makes a device node, a pipe or a socket.
func special(st *diskfs.Stat, p place) error {
	dev := 0
	if st.Mode&unix.S_IFMT == unix.S_IFCHR || st.Mode&unix.S_IFMT == unix.S_IFBLK {
		dev = int(unix.Mkdev(st.Major, st.Minor))
	}
	return uninterrupted(func() error { return unix.Mknodat(p.dir, p.name, st.Mode&unix.S_IFMT|0o600, dev) })
}

var (
	errLinked  = errors.New("it is another name of a file that cannot be read")
	errRefused = fmt.Errorf("special files need root: %w", unix.EPERM)
	errDevice  = errors.New("it is a device node, which is copied only on request")
)

// finish makes hard links, then sets the metadata of directories, deepest first.
func (c *copier) finish() error {
	for _, l := range c.later {
		if c.missing[l.first] {
			if err := c.failed(l.entry.Path, l.to, reading(errLinked)); err != nil {
				return err
			}
			continue
		}
		if why := c.refused[l.first]; why != nil {
			if errors.Is(why, errDevice) {
				c.devicesLeft.Add(1)
			}
			c.warned(l.entry.Path, why)
			continue
		}
		if err := c.failed(l.entry.Path, l.to, c.link(l)); err != nil {
			return err
		}
	}
	for i := len(c.dirs) - 1; i >= 0; i-- {
		d := c.dirs[i]
		err := c.at(d.to, func(p place) error { return c.keep(d.entry, p) })
		if err := c.failed(d.entry.Path, "", err); err != nil {
			return err
		}
	}
	return nil
}

// link makes a further name of a file.
func (c *copier) link(l made) error {
	err := c.at(l.to, func(p place) error {
		if c.opt.Force {
			if err := c.replace(p); err != nil {
				return err
			}
		}
		return c.at(l.first, func(first place) error {
			return p.err("link", uninterrupted(func() error { return unix.Linkat(first.dir, first.name, p.dir, p.name, 0) }))
		})
	})
	if err != nil {
		return fmt.Errorf("copy %s: %w", l.entry.Path, err)
	}
	c.files.Add(1)
	return nil
}

// timespec is exact for all years: nanoseconds since 1970 fill 64 bits by 2262.
func timespec(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

func (c *copier) warned(name string, err error) {
	if c.opt.Warn != nil {
		c.telling.Lock()
		defer c.telling.Unlock()
		c.opt.Warn(name, err)
	}
}

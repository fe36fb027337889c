// Package browse walks, finds and copies the files of a file system inside an image: the work
// of the file commands, without a mount and without root.
//
// An image can be damaged anywhere. Everything here returns all that can be read, and reports
// the rest to a callback.
package browse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Entry is a file found by a walk.
type Entry struct {
	Path string // within the file system, in diskfs's form
	Info fs.FileInfo
	Stat *diskfs.Stat

	in diskfs.Inodes
}

// IsDir reports whether the entry is a directory.
func (e *Entry) IsDir() bool { return e.Info.IsDir() }

// Node reads the entry's inode, without a search for its path.
func (e *Entry) Node() (diskfs.Inode, error) {
	node, err := e.in.Inode(e.Stat.Ino)
	return node, e.err("read", err)
}

// Open opens a file that is not a directory.
func (e *Entry) Open() (diskfs.File, error) {
	node, err := e.Node()
	if err != nil {
		return nil, err
	}
	return diskfs.OpenInode(node, e.Path), nil
}

// ReadLink returns the target of a symbolic link.
func (e *Entry) ReadLink() (string, error) {
	node, err := e.Node()
	if err != nil {
		return "", err
	}
	target, err := node.Readlink()
	return target, e.err("readlink", err)
}

// Xattrs lists the extended attributes that can be read, with the error of the others.
func (e *Entry) Xattrs() ([]diskfs.Xattr, error) {
	node, err := e.Node()
	if err != nil {
		return nil, err
	}
	list, err := node.Xattrs()
	return list, e.err("listxattr", err)
}

func (e *Entry) err(op string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: e.Path, Err: err}
}

// maxDepth bounds a walk.
const maxDepth = 4096

// Visited are the directories that a walk has visited. A hostile image can have a directory
// inside itself, or under many names each of which has many more below: a walk that visits
// each once ends. Neighbouring inodes share a word.
type Visited map[uint64]uint64

// Add adds a directory. It fails (diskfs.ErrCorrupt) if it was there already: in no supported
// file system does a directory have two names.
func (v Visited) Add(fsys diskfs.FileSystem, e *Entry) error {
	word, bit := e.Stat.Ino/64, uint64(1)<<(e.Stat.Ino%64)
	if v[word]&bit != 0 {
		return &fs.PathError{Op: "walk", Path: e.Path, Err: &diskfs.CorruptError{
			Type: fsys.Inodes().Info().Type, Where: fmt.Sprintf("directory %d", e.Stat.Ino), What: "has several names",
		}}
	}
	v[word] |= bit
	return nil
}

// Lstat returns one entry.
func Lstat(fsys diskfs.FileSystem, name string) (*Entry, error) {
	st, err := fsys.Lstat(name)
	if err != nil {
		return nil, err
	}
	return newEntry(fsys, name, st), nil
}

// Stat returns one entry, following symbolic links.
func Stat(fsys diskfs.FileSystem, name string) (*Entry, error) {
	st, err := fsys.Stat(name)
	if err != nil {
		return nil, err
	}
	return newEntry(fsys, name, st), nil
}

func newEntry(fsys diskfs.FileSystem, name string, st fs.FileInfo) *Entry {
	s, ok := st.Sys().(*diskfs.Stat)
	if !ok {
		s = &diskfs.Stat{Size: st.Size(), Mtime: st.ModTime()} // not reached: diskfs always has it
	}
	return &Entry{Path: name, Info: st, Stat: s, in: fsys.Inodes()}
}

// Walk visits a file and, for a directory, all that is below, directories before their
// content, by name. visit may return fs.SkipDir. fail, if set, is called for what cannot be
// read; if it returns nil the walk continues.
func Walk(ctx context.Context, fsys diskfs.FileSystem, name string, visit func(*Entry) error, fail func(name string, err error) error) error {
	w := &walker{ctx: ctx, fsys: fsys, visit: visit, fail: fail, visited: Visited{}}
	if fail == nil {
		w.fail = func(_ string, err error) error { return err }
	}
	e, err := Lstat(fsys, name)
	if err != nil {
		return err
	}
	return w.walk(e, 0)
}

type walker struct {
	ctx   context.Context // of one walk
	fsys  diskfs.FileSystem
	visit func(*Entry) error
	fail  func(string, error) error

	visited Visited
}

// walk visits e, at a depth of above.
func (w *walker) walk(e *Entry, above int) (err error) {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if err := w.visit(e); err != nil {
		if errors.Is(err, fs.SkipDir) && e.IsDir() {
			return nil
		}
		return err
	}
	if !e.IsDir() {
		return nil
	}
	if err := w.visited.Add(w.fsys, e); err != nil {
		return w.fail(e.Path, err)
	}
	if above == maxDepth {
		return w.fail(e.Path, &fs.PathError{Op: "walk", Path: e.Path, Err: errors.New("directories are nested too deeply")})
	}
	dir, err := ReadDir(w.ctx, e)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if damage := dir.Damage(); damage != nil {
		if err := w.fail(e.Path, damage); err != nil {
			return err
		}
	}
	for child, err := range dir.All() {
		if err != nil {
			return err
		}
		if child.Err != nil {
			if err := w.fail(child.Path, child.Err); err != nil {
				return err
			}
			continue
		}
		if err := w.walk(child.Entry, above+1); err != nil {
			return err
		}
	}
	return nil
}

// Join appends a name to a directory's path.
func Join(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}

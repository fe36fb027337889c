// Package browse walks, finds and copies the files of a file system inside an
// image: what the file commands do, without a mount and without root.
//
// An image can be damaged anywhere. Everything here gives all that can be read, and
// tells of what cannot through a callback.
package browse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Entry is a file met on a walk.
type Entry struct {
	Path string // in the file system, as diskfs has it
	Info fs.FileInfo
	Stat *diskfs.Stat

	in diskfs.Inodes
}

// IsDir tells whether the entry is a directory.
func (e *Entry) IsDir() bool { return e.Info.IsDir() }

// Node reads the entry's inode: no path has to be searched again.
func (e *Entry) Node() (diskfs.Inode, error) {
	node, err := e.in.Inode(e.Stat.Ino)
	return node, e.err("read", err)
}

// Open opens what is no directory.
func (e *Entry) Open() (diskfs.File, error) {
	node, err := e.Node()
	if err != nil {
		return nil, err
	}
	return diskfs.OpenInode(node, e.Path), nil
}

// ReadLink gives the target of a symbolic link.
func (e *Entry) ReadLink() (string, error) {
	node, err := e.Node()
	if err != nil {
		return "", err
	}
	target, err := node.Readlink()
	return target, e.err("readlink", err)
}

// Xattrs lists the extended attributes: those that can be read, and the error that says
// what cannot.
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

// Visited are the directories of a file system that a walk came through. A hostile image can
// have a directory inside itself, or under many names each of which has many more
// below: a walk that goes through each once has an end. Neighbouring inodes share a word.
type Visited map[uint64]uint64

// Add notes a directory. It is an error (diskfs.ErrCorrupt) if it was there already: no file
// system that is read here gives a directory two names.
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

// Lstat gives one entry.
func Lstat(fsys diskfs.FileSystem, name string) (*Entry, error) {
	st, err := fsys.Lstat(name)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the path itself
	}
	return newEntry(fsys, name, st), nil
}

// Stat gives one entry, that of the target where name is a symbolic link.
func Stat(fsys diskfs.FileSystem, name string) (*Entry, error) {
	st, err := fsys.Stat(name)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the path itself
	}
	return newEntry(fsys, name, st), nil
}

func newEntry(fsys diskfs.FileSystem, name string, st fs.FileInfo) *Entry {
	s, ok := st.Sys().(*diskfs.Stat)
	if !ok {
		s = &diskfs.Stat{Size: st.Size(), Mtime: st.ModTime()} // not reached: diskfs gives nothing else
	}
	return &Entry{Path: name, Info: st, Stat: s, in: fsys.Inodes()}
}

// Walk visits a file and, of a directory, all that is below, directories before
// what they hold, by name. visit may answer fs.SkipDir. fail, if it is set, is
// told of what cannot be read and may have the walk go on by answering nil.
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
	ctx   context.Context //nolint:containedctx // lives for one walk
	fsys  diskfs.FileSystem
	visit func(*Entry) error
	fail  func(string, error) error

	visited Visited
}

// walk visits e, which so many directories are above of.
func (w *walker) walk(e *Entry, above int) (err error) {
	if err := w.ctx.Err(); err != nil {
		return err //nolint:wrapcheck // cancelled
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

// Join puts a name behind a directory's path.
func Join(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}

// Package browse walks, finds and copies the files of a file system inside an
// image: what the file commands do, without a mount and without root.
package browse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// Entry is a file met on a walk.
type Entry struct {
	Path string // in the file system, as diskfs has it
	Info fs.FileInfo
	Stat *diskfs.Stat
}

// IsDir tells whether the entry is a directory.
func (e *Entry) IsDir() bool { return e.Info.IsDir() }

// maxDepth bounds a walk.
const maxDepth = 4096

// Visited are the directories of a file system that a walk came through. A hostile image can
// have a directory inside itself, or under many names each of which has many more
// below: a walk that goes through each once has an end.
type Visited map[uint64]bool

// Add notes a directory. It is an error (diskfs.ErrCorrupt) if it was there already: no file
// system that is read here gives a directory two names.
func (v Visited) Add(fsys diskfs.FileSystem, e *Entry) error {
	if v[e.Stat.Ino] {
		return &fs.PathError{Op: "walk", Path: e.Path, Err: &diskfs.CorruptError{
			Type: fsys.Inodes().Info().Type, Where: fmt.Sprintf("directory %d", e.Stat.Ino), What: "has several names",
		}}
	}
	v[e.Stat.Ino] = true
	return nil
}

// Lstat gives one entry.
func Lstat(fsys diskfs.FileSystem, name string) (*Entry, error) {
	st, err := fsys.Lstat(name)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the path itself
	}
	return &Entry{Path: name, Info: st, Stat: statOf(st)}, nil
}

func statOf(st fs.FileInfo) *diskfs.Stat {
	if s, ok := st.Sys().(*diskfs.Stat); ok {
		return s
	}
	return &diskfs.Stat{Size: st.Size(), Mtime: st.ModTime()} // not reached: diskfs gives nothing else
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
func (w *walker) walk(e *Entry, above int) error {
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
	entries, err := w.fsys.ReadDir(e.Path)
	if err != nil {
		if err := w.fail(e.Path, err); err != nil {
			return err
		}
	}
	for _, d := range entries {
		name := Join(e.Path, d.Name())
		child, err := Lstat(w.fsys, name)
		if err != nil {
			if err := w.fail(name, err); err != nil {
				return err
			}
			continue
		}
		if err := w.walk(child, above+1); err != nil {
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

// HasGlob tells whether a path has a wildcard.
func HasGlob(name string) bool { return strings.ContainsAny(name, `*?[\`) }

// Glob lists the files that a pattern matches, in order, with the wildcards of
// path.Match within each element. A pattern that names a file as it is gives just
// that.
func Glob(ctx context.Context, fsys diskfs.FileSystem, pattern string) ([]string, error) {
	if _, err := fsys.Lstat(pattern); err == nil || !HasGlob(pattern) {
		return []string{pattern}, err //nolint:wrapcheck // names the path itself
	}
	found := []string{"."}
	for elem := range strings.SplitSeq(pattern, "/") {
		var next []string
		for _, dir := range found {
			if err := ctx.Err(); err != nil {
				return nil, err //nolint:wrapcheck // cancelled
			}
			if !HasGlob(elem) {
				name := Join(dir, elem)
				if _, err := fsys.Lstat(name); err == nil {
					next = append(next, name)
				}
				continue
			}
			if st, err := fsys.Stat(dir); err != nil || !st.IsDir() {
				continue
			}
			entries, err := fsys.ReadDir(dir)
			if err != nil {
				return nil, err //nolint:wrapcheck // names the path itself
			}
			for _, e := range entries {
				ok, err := path.Match(elem, e.Name())
				if err != nil {
					return nil, &fs.PathError{Op: "glob", Path: pattern, Err: err}
				}
				if ok && (e.Name()[0] != '.' || elem[0] == '.') {
					next = append(next, Join(dir, e.Name()))
				}
			}
		}
		found = next
	}
	if len(found) == 0 {
		return nil, &fs.PathError{Op: "glob", Path: pattern, Err: fs.ErrNotExist}
	}
	return found, nil
}

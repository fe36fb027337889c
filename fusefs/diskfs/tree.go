package diskfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/varve-io/varve/internal/bytesize"
)

const (
	maxLinks    = 40       // symbolic links followed in one path, as Linux: then ELOOP
	maxTarget   = 4096     // bytes of one symbolic link's target, as Linux's PATH_MAX
	maxReadFile = 1 << 30  // bytes that ReadFile takes into memory
	maxListing  = 16 << 20 // entries that ReadDir takes into memory
)

// tree makes a FileSystem of Inodes.
type tree struct {
	in    Inodes
	names *nameCache
}

// New makes a FileSystem of in. It keeps the names of directories that were
// listed or often searched, within a fixed amount of memory, so that opening every
// file of a directory costs the same per file however the format searches.
//
// ReadFile refuses files over 1 GiB and ReadDir directories over 16 Mi entries
// (syscall.EFBIG): a small hostile image can claim any size. Read such through Open
// and Inodes.
func New(in Inodes) FileSystem {
	return &tree{in: in, names: newNameCache()}
}

func (t *tree) Inodes() Inodes { return t.in }

func (t *tree) Open(name string) (fs.File, error) {
	node, err := t.find("open", name, true)
	if err != nil {
		return nil, err
	}
	info := newFileInfo(path.Base(name), node.Stat())
	if info.IsDir() {
		return &openDir{tree: t, name: name, info: info, node: node}, nil
	}
	return &openFile{Inode: node, name: name, info: info}, nil
}

func (t *tree) Stat(name string) (fs.FileInfo, error) {
	node, err := t.find("stat", name, true)
	if err != nil {
		return nil, err
	}
	return newFileInfo(path.Base(name), node.Stat()), nil
}

func (t *tree) Lstat(name string) (fs.FileInfo, error) {
	node, err := t.find("lstat", name, false)
	if err != nil {
		return nil, err
	}
	return newFileInfo(path.Base(name), node.Stat()), nil
}

func (t *tree) ReadLink(name string) (string, error) {
	node, err := t.find("readlink", name, false)
	if err != nil {
		return "", err
	}
	target, err := node.Readlink()
	return target, pathError("readlink", name, err)
}

func (t *tree) Xattrs(name string) ([]Xattr, error) {
	node, err := t.find("listxattr", name, false)
	if err != nil {
		return nil, err
	}
	attrs, err := node.Xattrs()
	return attrs, pathError("listxattr", name, err)
}

func (t *tree) ReadFile(name string) ([]byte, error) {
	node, err := t.find("open", name, true)
	if err != nil {
		return nil, err
	}
	st := node.Stat()
	switch st.FileMode().Type() {
	case fs.ModeDir:
		return nil, pathError("read", name, syscall.EISDIR)
	case 0:
	default:
		return []byte{}, nil
	}
	if st.Size > maxReadFile {
		return nil, pathError("read", name, fmt.Errorf("%s is too much to read at once; open the file instead: %w", bytesize.Format(st.Size), syscall.EFBIG))
	}
	b := make([]byte, st.Size)
	n, err := node.ReadAt(b, 0)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return b[:n], pathError("read", name, err)
}

func (t *tree) ReadDir(name string) ([]fs.DirEntry, error) {
	node, err := t.find("open", name, true)
	if err != nil {
		return nil, err
	}
	entries, err := t.list(node)
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, pathError("readdir", name, err)
}

// list reads a whole directory, in the order of the disk, and remembers its names. What
// cannot be read of it is the error, beside all entries that can.
func (t *tree) list(dir Inode) ([]fs.DirEntry, error) {
	if !dir.Stat().FileMode().IsDir() {
		return nil, syscall.ENOTDIR
	}
	var entries []fs.DirEntry
	var faults Faults
	names := map[string]uint64{}
	for e, err := range dir.Entries() {
		if err != nil {
			names = nil // a name that is not there may stand where the damage is
			if !faults.Add(err) {
				break
			}
			continue
		}
		if len(entries) == maxListing {
			return entries, fmt.Errorf("more than %d entries: %w", maxListing, syscall.EFBIG)
		}
		entries = append(entries, &dirEntry{tree: t, e: e})
		if names != nil {
			if _, twice := names[e.Name]; !twice { // as Lookup, the first
				names[e.Name] = e.Ino
			}
			if len(names) > maxCachedNames {
				names = nil
			}
		}
	}
	if names != nil {
		t.names.put(dir.Stat().Ino, names)
	}
	return entries, faults.Err()
}

// lookup finds a name in a directory, by the remembered names if it can.
func (t *tree) lookup(dir Inode, name string) (uint64, error) {
	st := dir.Stat()
	if !st.FileMode().IsDir() {
		return 0, syscall.ENOTDIR
	}
	names, often := t.names.get(st.Ino)
	if names == nil && often {
		if _, err := t.list(dir); err == nil {
			names, _ = t.names.get(st.Ino)
		}
	}
	if names == nil {
		return dir.Lookup(name)
	}
	ino, ok := names[name]
	if !ok {
		return Missing(dir, name)
	}
	return ino, nil
}

// find resolves a path to its inode. Errors come back as *fs.PathError.
func (t *tree) find(op, name string, follow bool) (Inode, error) {
	if !ValidPath(name) {
		return nil, pathError(op, name, fs.ErrInvalid)
	}
	node, err := t.resolve(name, follow)
	return node, pathError(op, name, err)
}

func (t *tree) resolve(name string, follow bool) (Inode, error) {
	node, err := t.in.Inode(t.in.Root())
	if err != nil {
		return nil, err
	}
	stack := []Inode{node} // the directories from the root to where we are
	rest := name
	for links := 0; rest != ""; {
		var elem string
		elem, rest, _ = strings.Cut(rest, "/")
		if (elem == "." || elem == "..") && !stack[len(stack)-1].Stat().FileMode().IsDir() {
			return nil, syscall.ENOTDIR
		}
		switch elem {
		case "", ".":
			continue
		case "..":
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		dir := stack[len(stack)-1]
		ino, err := t.lookup(dir, elem)
		if err != nil {
			return nil, err
		}
		node, err := t.in.Inode(ino)
		if err != nil {
			return nil, Dangling(t.in, dir.Stat().Ino, ino, err)
		}
		if node.Stat().FileMode().Type() != fs.ModeSymlink || (rest == "" && !follow) {
			// A directory inside itself would let a walk over the tree never end.
			if slices.ContainsFunc(stack, func(up Inode) bool { return up.Stat().Ino == ino }) {
				return nil, &CorruptError{Type: t.in.Info().Type, Where: fmt.Sprintf("inode %d", ino), What: "directory is inside itself"}
			}
			stack = append(stack, node)
			continue
		}
		if links++; links > maxLinks {
			return nil, syscall.ELOOP
		}
		target, err := node.Readlink()
		if err != nil {
			return nil, err
		}
		if len(target) > maxTarget {
			return nil, syscall.ENAMETOOLONG
		}
		if target == "" {
			return nil, fs.ErrNotExist
		}
		if target[0] == '/' {
			stack = stack[:1]
		}
		if rest != "" {
			target += "/" + rest
		}
		rest = target
	}
	return stack[len(stack)-1], nil
}

// pathError wraps err unless it is nil.
func pathError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

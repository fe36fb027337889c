package fusefs

import (
	"fmt"
	"iter"
	"runtime/debug"
	"sync"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// guard calls do, which parses what is on a point's disk. A panic is a bug that the disk can
// trigger: it is logged and becomes an error, so that the mount's other points and files stay.
func (p *point) guard(op string, do func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			p.panicked(op, v)
			err = fmt.Errorf("panic: %v", v)
		}
	}()
	return do()
}

// mostPanics is how many panics are logged of a point, beside the first of each operation. Who lists a
// large directory may meet one for each name.
const mostPanics = 30

// panics are those of a point.
type panics struct {
	mu   sync.Mutex
	of   map[string]bool // operations that had one
	more int             // later ones
}

// panicked logs a panic: the first of an operation with its stack, some of the others without.
func (p *point) panicked(op string, v any) {
	what := []any{"point", p.info.Name(), "operation", op, "panic", fmt.Sprint(v)}
	p.panics.mu.Lock()
	defer p.panics.mu.Unlock()
	if p.panics.of[op] {
		if p.panics.more++; p.panics.more > mostPanics {
			return
		}
		if p.panics.more == mostPanics {
			what = append(what, "note", "no more of these are logged for this point")
		}
	} else {
		if p.panics.of == nil {
			p.panics.of = map[string]bool{}
		}
		p.panics.of[op] = true
		what = append(what, "stack", string(debug.Stack()))
	}
	p.fs.log.Error("a panic while a recovery point was read", what...)
}

// guarded are the inodes of a volume, with every call guarded that reads the disk.
type guarded struct {
	diskfs.Inodes
	p *point
}

func (g guarded) Info() (info diskfs.Info) {
	_ = g.p.guard("describe the volume", func() error {
		info = g.Inodes.Info()
		return nil
	})
	return info
}

func (g guarded) Inode(ino uint64) (node diskfs.Inode, err error) {
	err = g.p.guard("read inode", func() error {
		inner, err := g.Inodes.Inode(ino)
		if err == nil {
			node = guardedInode{inner, g.p}
		}
		return err
	})
	return node, err
}

// guardedInode is one of them.
type guardedInode struct {
	diskfs.Inode
	p *point
}

func (n guardedInode) MayHide(name string) bool {
	u, ok := n.Inode.(diskfs.Unlisted)
	return ok && u.MayHide(name)
}

func (n guardedInode) Lookup(name string) (ino uint64, err error) {
	err = n.p.guard("look up a name", func() (err error) {
		ino, err = n.Inode.Lookup(name)
		return err
	})
	return ino, err
}

func (n guardedInode) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) {
		more := true
		err := n.p.guard("list a directory", func() error {
			n.Inode.Entries()(func(e diskfs.Dirent, err error) bool {
				more = yield(e, err)
				return more
			})
			return nil
		})
		if err != nil && more {
			yield(diskfs.Dirent{}, err)
		}
	}
}

func (n guardedInode) Readlink() (target string, err error) {
	err = n.p.guard("read a link", func() (err error) {
		target, err = n.Inode.Readlink()
		return err
	})
	return target, err
}

func (n guardedInode) Xattrs() (list []diskfs.Xattr, err error) {
	err = n.p.guard("list attributes", func() (err error) {
		list, err = n.Inode.Xattrs()
		return err
	})
	return list, err
}

func (n guardedInode) ReadAt(b []byte, off int64) (read int, err error) {
	err = n.p.guard("read a file", func() (err error) {
		read, err = n.Inode.ReadAt(b, off)
		return err
	})
	return read, err
}

func (n guardedInode) NextData(off int64) (e diskfs.Extent, err error) {
	err = n.p.guard("seek in a file", func() (err error) {
		e, err = n.Inode.NextData(off)
		return err
	})
	return e, err
}

package fusefs

import (
	"bytes"
	"errors"
	"io"
	"iter"
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/fusefs/diskfs"
)

// panicking is a volume whose parser has a bug: it panics on everything but its root's metadata.
type panicking struct{ diskfs.Inodes }

func (panicking) Info() diskfs.Info { return diskfs.Info{Type: "panicking"} }

func (panicking) Inode(ino uint64) (diskfs.Inode, error) {
	if ino != 1 {
		panic("inode")
	}
	return panickingNode{}, nil
}

type panickingNode struct{ diskfs.Inode }

func (panickingNode) Stat() *diskfs.Stat {
	return &diskfs.Stat{Ino: 1, Mode: syscall.S_IFDIR, Size: 1000}
}
func (panickingNode) Lookup(string) (uint64, error)         { panic("lookup") }
func (panickingNode) Readlink() (string, error)             { panic("readlink") }
func (panickingNode) Xattrs() ([]diskfs.Xattr, error)       { panic("xattrs") }
func (panickingNode) ReadAt([]byte, int64) (int, error)     { panic("read") }
func (panickingNode) NextData(int64) (diskfs.Extent, error) { panic("data") }
func (panickingNode) Entries() iter.Seq2[diskfs.Dirent, error] {
	return func(yield func(diskfs.Dirent, error) bool) {
		if yield(diskfs.Dirent{Name: "file", Ino: 2}, nil) {
			panic("entries")
		}
	}
}

// A panic of a parser is the error of the call that met it, and is logged.
func TestPanicOfAParser(t *testing.T) {
	var log bytes.Buffer
	p := &point{fs: &FS{log: slog.New(slog.NewTextHandler(&log, nil))}, info: &points.Point{}}
	vol := &volume{point: p, inodes: guarded{panicking{}, p}}
	node, err := vol.inodes.Inode(1)
	if err != nil {
		t.Fatal(err)
	}
	n := &inodeNode{vol: vol, node: node}
	ctx := t.Context()
	list := func() (names []string, errno syscall.Errno) {
		h, _, errno := n.OpendirHandle(ctx, 0)
		if errno != 0 {
			return nil, errno
		}
		dir := h.(*dirHandle)
		defer dir.Releasedir(ctx, 0)
		for {
			e, errno := dir.Readdirent(ctx)
			if e == nil {
				return names, errno
			}
			names = append(names, e.Name)
		}
	}
	for what, call := range map[string]func() syscall.Errno{
		"inode":    func() syscall.Errno { _, no := vol.adopt(ctx, nil, 1, 2, &fuse.EntryOut{}); return no },
		"lookup":   func() syscall.Errno { _, no := n.Lookup(ctx, "file", &fuse.EntryOut{}); return no },
		"readlink": func() syscall.Errno { _, no := n.Readlink(ctx); return no },
		"xattrs":   func() syscall.Errno { _, no := n.Listxattr(ctx, nil); return no },
		"read":     func() syscall.Errno { _, no := n.Read(ctx, nil, make([]byte, 10), 0); return no },
		"data":     func() syscall.Errno { _, no := n.Lseek(ctx, nil, 0, unix.SEEK_DATA); return no },
		"entries": func() syscall.Errno {
			names, no := list()
			if len(names) != 1 || names[0] != "file" {
				t.Errorf("the directory lists %q", names)
			}
			return no
		},
	} {
		log.Reset()
		if no := call(); no != syscall.EIO {
			t.Errorf("%s: %v", what, no)
		}
		if got := log.String(); !strings.Contains(got, "panic="+what) || !strings.Contains(got, "panicking") {
			t.Errorf("%s: the log has no stack: %s", what, got)
		}
	}
	// Names are kept of directories that can be read only; who stops before the panic meets none.
	for range 2 * oftenAsked {
		if _, err := n.find("file"); err == nil {
			t.Fatal("a name was found")
		}
	}
	for _, err := range node.Entries() {
		if err != nil {
			t.Error(err)
		}
		break
	}
	// Errors pass through as they are.
	if err := p.guard("", func() error { return io.EOF }); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// A parser that panics for each name of a large directory fills no log.
func TestPanicsAreLoggedSparingly(t *testing.T) {
	var log bytes.Buffer
	fs := &FS{log: slog.New(slog.NewTextHandler(&log, nil))}
	for range 2 { // each point has its own
		log.Reset()
		p := &point{fs: fs, info: &points.Point{}}
		for range 1000 {
			for _, op := range []string{"one", "other"} {
				if err := p.guard(op, func() error { panic("bug") }); err == nil {
					t.Fatal("no error")
				}
			}
		}
		said := log.String()
		if lines, stacks := strings.Count(said, "\n"), strings.Count(said, "stack="); lines != mostPanics+2 || stacks != 2 {
			t.Errorf("%d lines, %d stacks", lines, stacks)
		}
		if !strings.HasSuffix(said, "note=\"no more of these are logged for this point\"\n") {
			t.Errorf("the last line is %s", said[max(len(said)-300, 0):])
		}
	}
}

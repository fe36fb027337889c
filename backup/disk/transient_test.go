package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// flakyFile is a file in a FUSE mount, whose reads fail as the test says.
type flakyFile struct {
	fs.Inode
	content []byte

	mu   sync.Mutex
	fail func(off int64, n int) bool
}

var (
	_ = (fs.NodeOpener)((*flakyFile)(nil))
	_ = (fs.NodeReader)((*flakyFile)(nil))
	_ = (fs.NodeGetattrer)((*flakyFile)(nil))
)

func (f *flakyFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *flakyFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Blksize = 0o600, uint64(len(f.content)), pageSize
	return 0
}

func (f *flakyFile) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()

	end := min(off+int64(len(dest)), int64(len(f.content)))
	if f.fail(off, int(end-off)) {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(f.content[off:end]), 0
}

// flaky mounts a file of that content, and returns its path and the file.
func flaky(t *testing.T, content []byte) (string, *flakyFile) {
	t.Helper()

	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("needs FUSE: %v", err)
	}

	file := &flakyFile{content: content, fail: func(int64, int) bool { return false }}
	root := &fs.Inode{}
	dir := t.TempDir()

	server, err := fs.Mount(dir, root, &fs.Options{OnAdd: func(ctx context.Context) {
		root.AddChild("disk", root.NewPersistentInode(ctx, file, fs.StableAttr{Mode: fuse.S_IFREG}), true)
	}})
	if err != nil {
		t.Skipf("needs FUSE: %v", err)
	}

	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "disk"), file
}

// TestTransientErrors reads a disk whose errors come and go. All of it is read, or the
// error says where it ends: a short read without an error is neither.
func TestTransientErrors(t *testing.T) {
	const size = 1 << 20

	content := random(size, 7)
	path, file := flaky(t, content)

	check := func(t *testing.T, s *Source, from int64) {
		t.Helper()

		p := AlignedBuffer(size)[:size-from]
		n, err := s.ReadAt(p, from)

		var bad *ReadError

		switch {
		case err == nil:
			if n != len(p) {
				t.Errorf("ReadAt(%d) = %d of %d bytes without an error", from, n, len(p))
			}
		case errors.As(err, &bad):
			at := from + int64(n)
			if offset, length := bad.BadRange(); at < offset || at >= offset+length {
				t.Errorf("ReadAt(%d) read up to %d, and the bad range is %d+%d", from, at, offset, length)
			}
		default:
			t.Errorf("ReadAt(%d): %v", from, err)
		}

		if !bytes.Equal(p[:n], content[from:from+int64(n)]) {
			t.Errorf("ReadAt(%d) read other bytes than those of the disk", from)
		}
	}

	for _, buffered := range []bool{false, true} {
		s := openSource(t, path, Options{Buffered: buffered})

		// Errors at one place, some number of times, so that they end at any depth of
		// narrowing.
		for _, at := range []int64{0, 4096, 300 << 10, size - 4096} {
			for times := 1; times <= 12; times++ {
				t.Run(fmt.Sprintf("buffered %v, at %d %d times", buffered, at, times), func(t *testing.T) {
					left := times

					file.mu.Lock()
					file.fail = func(off int64, n int) bool {
						if off <= at && at < off+int64(n) && left > 0 {
							left--
							return true
						}
						return false
					}
					file.mu.Unlock()
					check(t, s, 0)
				})
			}
		}

		t.Run(fmt.Sprintf("buffered %v, one in four", buffered), func(t *testing.T) {
			errs := rand.New(rand.NewPCG(1, 2)) // of the file's mutex

			file.mu.Lock()
			file.fail = func(int64, int) bool { return errs.IntN(4) == 0 }
			file.mu.Unlock()

			rng := rand.New(rand.NewPCG(3, 4))
			for range 50 {
				check(t, s, rng.Int64N(size))
			}
		})
	}
}

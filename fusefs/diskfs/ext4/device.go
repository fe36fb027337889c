package ext4

import (
	"container/list"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// cacheBytes is what the metadata blocks kept in memory may take, per volume.
const cacheBytes = 16 << 20

// overlay holds the blocks that the journal would write, by their number.
type overlay map[uint64]loggedBlock

// loggedBlock is a block's place in the journal.
type loggedBlock struct {
	pos     int64 // bytes from the start of the device
	escaped bool  // its first four bytes were the journal's magic number
}

// device reads bytes and blocks of a volume as the journal would have them. It
// checks every range against the volume's size.
type device struct {
	r         io.ReaderAt
	size      int64
	blockSize int
	blocks    uint64 // of the volume; at most size/blockSize
	over      overlay
	changed   []uint64 // the blocks of over, sorted

	mu    sync.Mutex
	cache map[uint64]*list.Element // of *cachedBlock
	order *list.List               // front: used last
}

type cachedBlock struct {
	n uint64
	b []byte
}

func newDevice(r io.ReaderAt, size int64, blockSize int, blocks uint64, over overlay) *device {
	return &device{
		r: r, size: size, blockSize: blockSize, blocks: blocks, over: over, changed: slices.Sorted(maps.Keys(over)),
		cache: map[uint64]*list.Element{}, order: list.New(),
	}
}

// replayed reports whether the journal has any of count blocks from n on.
func (d *device) replayed(n, count uint64) bool {
	i, _ := slices.BinarySearch(d.changed, n)
	return i < len(d.changed) && d.changed[i]-n < count
}

// block gives a metadata block, from the cache if it can. The caller must not
// change it. where says what for, in errors.
func (d *device) block(n uint64, where string) ([]byte, error) {
	if n >= d.blocks {
		return nil, corrupt(where, "block %d is beyond the volume's %d blocks", n, d.blocks)
	}
	d.mu.Lock()
	if e, ok := d.cache[n]; ok {
		d.order.MoveToFront(e)
		d.mu.Unlock()
		return e.Value.(*cachedBlock).b, nil
	}
	d.mu.Unlock()

	b := make([]byte, d.blockSize)
	if err := d.readAt(b, int64(n)*int64(d.blockSize)); err != nil {
		return nil, wrapWhere(where, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if e, ok := d.cache[n]; ok { // another goroutine was faster
		return e.Value.(*cachedBlock).b, nil
	}
	d.cache[n] = d.order.PushFront(&cachedBlock{n: n, b: b})
	for d.order.Len() > max(cacheBytes/d.blockSize, 16) {
		delete(d.cache, d.order.Remove(d.order.Back()).(*cachedBlock).n)
	}
	return b, nil
}

// readAt fills p from byte off of the volume, with the journal's blocks where it
// has them.
func (d *device) readAt(p []byte, off int64) error {
	if off < 0 || off > d.size || int64(len(p)) > d.size-off {
		return corrupt(fmt.Sprintf("byte %d", off), "range of %d bytes is beyond the device's %d", len(p), d.size)
	}
	if len(d.over) == 0 {
		return diskfs.ReadFull(d.r, p, off)
	}
	bs := int64(d.blockSize)
	// Runs of blocks that the journal does not have are read in one piece.
	for start := 0; start < len(p); {
		n := start
		var lb loggedBlock
		found := false
		for n < len(p) {
			if lb, found = d.over[uint64((off+int64(n))/bs)]; found {
				break
			}
			n += int(bs - (off+int64(n))%bs)
		}
		n = min(n, len(p))
		if n > start {
			if err := diskfs.ReadFull(d.r, p[start:n], off+int64(start)); err != nil {
				return err
			}
		}
		if !found {
			return nil
		}
		b, err := d.logged(lb)
		if err != nil {
			return err
		}
		start = n + copy(p[n:], b[(off+int64(n))%bs:])
	}
	return nil
}

// logged reads a block from the journal.
func (d *device) logged(lb loggedBlock) ([]byte, error) {
	b := make([]byte, d.blockSize)
	if err := diskfs.ReadFull(d.r, b, lb.pos); err != nil {
		return nil, err
	}
	if lb.escaped {
		be.PutUint32(b, journalMagic)
	}
	return b, nil
}

// wrapWhere says what was being read, unless the error says so itself.
func wrapWhere(where string, err error) error {
	if errors.Is(err, diskfs.ErrCorrupt) || where == "" {
		return err
	}
	return fmt.Errorf("ext4: %s: %w", where, err)
}

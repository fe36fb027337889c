package xfs

import (
	"container/list"
	"fmt"
	"sync"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/internal/bytesize"
)

const (
	pageSize = 4096
	sector   = 512 // the "basic block" in which buffers and the log are addressed
)

// device is the image, with what the log wrote laid over it.
type device struct {
	r interface {
		ReadAt(p []byte, off int64) (int, error)
	}
	size int64
	over *overlay // nil if nothing was replayed; not written to after Open
}

func (d *device) readAt(p []byte, off int64) error {
	if off < 0 || off > d.size || int64(len(p)) > d.size-off {
		return corrupt("image", "%d bytes at %d lie beyond its end at %d", len(p), off, d.size)
	}
	if err := diskfs.ReadFull(d.r, p, off); err != nil {
		return fmt.Errorf("xfs: %w", err)
	}
	if d.over != nil {
		d.over.patch(p, off)
	}
	return nil
}

// recovered reports whether any of n bytes at off came out of the log. Checksums
// of such blocks are stale: the log holds changes, and checksums are made when a
// block is written in place. The log's records have checksums of their own.
func (d *device) recovered(off, n int64) bool {
	return d.over != nil && d.over.touched(off, n)
}

// overlay holds the pages that log recovery changed.
type overlay struct {
	base  *device // without overlay
	pages map[int64]*page
	limit int // most pages
}

type page struct {
	data    [pageSize]byte
	changed uint8 // bit per sector
}

// maxOverlay bounds the memory for replayed metadata. A log is at most 2 GiB, and
// what one leaves to replay is mostly written many times over.
const maxOverlay = 1 << 30

func newOverlay(base *device) *overlay {
	return &overlay{base: base, pages: make(map[int64]*page), limit: maxOverlay / pageSize}
}

// write lays p over the image at off. Changes are tracked by sectors: all that p
// touches count as changed.
func (o *overlay) write(p []byte, off int64) error {
	if off < 0 || off > o.base.size || int64(len(p)) > o.base.size-off {
		return corrupt("log", "a change at byte %d lies beyond the end of the image", off)
	}
	for len(p) > 0 {
		no, in := off/pageSize, int(off%pageSize)
		pg := o.pages[no]
		if pg == nil {
			if len(o.pages) >= o.limit {
				return unsupported("a log that changes more than %s of metadata", bytesize.Format(int64(o.limit)*pageSize))
			}
			pg = new(page)
			n := min(pageSize, o.base.size-no*pageSize)
			if err := diskfs.ReadFull(o.base.r, pg.data[:n], no*pageSize); err != nil {
				return fmt.Errorf("xfs: %w", err)
			}
			o.pages[no] = pg
		}
		n := copy(pg.data[in:], p)
		for s := in / sector; s <= (in+n-1)/sector; s++ {
			pg.changed |= 1 << s
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (o *overlay) patch(p []byte, off int64) {
	if len(o.pages) == 0 {
		return
	}
	end := off + int64(len(p))
	for no := off / pageSize; no*pageSize < end; no++ {
		pg := o.pages[no]
		if pg == nil {
			continue
		}
		if start := no * pageSize; start >= off {
			copy(p[start-off:], pg.data[:])
		} else {
			copy(p, pg.data[off-start:])
		}
	}
}

func (o *overlay) touched(off, n int64) bool {
	for s := off / sector; s*sector < off+n; s++ {
		pg := o.pages[s*sector/pageSize]
		if pg != nil && pg.changed&(1<<(s%(pageSize/sector))) != 0 {
			return true
		}
	}
	return false
}

// cacheBytes bounds the cache of checked metadata blocks of one FS.
const cacheBytes = 16 << 20

// blockKey names a metadata block: by its place on the volume, or by its place in a
// directory, whose blocks need not be contiguous on the volume.
type blockKey struct {
	owner uint64 // inode number; 0: by place on the volume
	place uint64
	kind  blockKind
}

type blockKind uint8

const (
	kindBmap blockKind = iota
	kindBmapRealtime
	kindDirData
	kindDirIndex
	kindAttr
)

// blockCache keeps metadata blocks that were read and checked, least recently used
// out first. Blocks in it are never changed. It is safe for concurrent use.
type blockCache struct {
	mu    sync.Mutex
	max   int
	bytes int
	order *list.List // of *cachedBlock, most recently used first
	byKey map[blockKey]*list.Element
}

type cachedBlock struct {
	key  blockKey
	data []byte
}

func newBlockCache(max int) *blockCache {
	return &blockCache{max: max, order: list.New(), byKey: make(map[blockKey]*list.Element)}
}

func (c *blockCache) get(key blockKey) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.byKey[key]
	if e == nil {
		return nil
	}
	c.order.MoveToFront(e)
	return e.Value.(*cachedBlock).data
}

func (c *blockCache) put(key blockKey, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byKey[key] != nil {
		return // another goroutine has read it
	}
	c.byKey[key] = c.order.PushFront(&cachedBlock{key, data})
	c.bytes += len(data)
	for c.bytes > c.max {
		last := c.order.Back()
		b := last.Value.(*cachedBlock)
		c.order.Remove(last)
		delete(c.byKey, b.key)
		c.bytes -= len(b.data)
	}
}

// header says where a block that carries its own identity ("Metadata Integrity")
// keeps it. Version 4 blocks carry none.
type header struct {
	crc, blkno, uuid, owner int
}

var (
	bmapHeader   = header{crc: 64, blkno: 24, uuid: 40, owner: 56}
	dirHeader    = header{crc: 4, blkno: 8, uuid: 24, owner: 40}
	dablkHeader  = header{crc: 12, blkno: 16, uuid: 32, owner: 48}
	remoteHeader = header{crc: 12, blkno: 40, uuid: 16, owner: 32} // symlinks and attribute values
)

// checkHeader verifies a version 5 block that was read at off: its checksum, and
// that it belongs here, to this file system and to inode owner (0: any).
// recovered says that the log changed the block.
func (f *FS) checkHeader(b []byte, h header, off int64, owner uint64, recovered bool, where func() string) error {
	if !recovered && !checksumOK(b, h.crc) {
		return corrupt(where(), "checksum mismatch")
	}
	if got := be64(b, h.blkno); got != uint64(off/sector) {
		return corrupt(where(), "it says it lies at sector %d, not %d", got, off/sector)
	}
	if [16]byte(b[h.uuid:h.uuid+16]) != f.sb.metaUUID {
		return corrupt(where(), "it belongs to another file system")
	}
	if got := be64(b, h.owner); owner != 0 && got != owner {
		return corrupt(where(), "it says it belongs to inode %d, not %d", got, owner)
	}
	return nil
}

func inodeName(ino uint64) string { return fmt.Sprintf("inode %d", ino) }

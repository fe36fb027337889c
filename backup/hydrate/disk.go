package hydrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	defaultUnit = 1 << 20
	minUnit     = 4 << 10
	maxUnit     = 64 << 20
	// syncEvery is how many bytes arrive before they are made durable: what a
	// crash may cost.
	syncEvery = 128 << 20
)

// Disk is an image with its local copy.
type Disk struct {
	cache *Cache
	src   Source
	head  header
	name  string // of its directory
	data  *os.File
	fd    int
	log   *mapLog

	states states
	sums   []uint32     // of units that an earlier process wrote; nil if none
	held   atomic.Int64 // bytes of data
	known  atomic.Int64 // bytes that need no image: data and zeroes
	broken atomic.Bool  // the copy is not used any more
	noWait atomic.Bool  // the file system cannot read without waiting

	buffers sync.Pool // of one unit

	mu       sync.Mutex
	pending  []record // not in the map yet
	unsynced int64

	syncing  sync.Mutex
	syncData func() error // a field so that tests can make it fail

	begin  sync.Once
	ctx    context.Context //nolint:containedctx // ends the disk's hydration, which outlives the call that starts it
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	errors atomic.Int64 // reads of the background that failed in a row
}

// Open opens the copy of an image, or starts one. id identifies the image's
// content, such as a recovery point's ID: one to 200 bytes. unit is a power of
// two from 4 KiB to 64 MiB, best the image's block size; 0 for 1 MiB. A copy
// of another size or unit is started afresh.
func (c *Cache) Open(src Source, id string, unit int64) (*Disk, error) {
	name, err := dirName(id)
	if err != nil {
		return nil, err
	}
	if unit == 0 {
		unit = defaultUnit
	}
	if unit < minUnit || unit > maxUnit || unit&(unit-1) != 0 {
		return nil, fmt.Errorf("hydrate in units of %d bytes", unit)
	}
	d := &Disk{cache: c, src: src, name: name, head: header{id: id, size: src.Size(), unit: unit}}
	if d.head.size < 0 || d.head.units() > 1<<40 {
		return nil, fmt.Errorf("hydrate an image of %d bytes", d.head.size)
	}
	d.states = newStates(d.head.units())
	d.buffers.New = func() any { b := make([]byte, unit); return &b }
	d.ctx, d.cancel = context.WithCancel(c.ctx)
	d.syncData = func() error { return unix.Fdatasync(d.fd) }

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[name] != nil {
		return nil, fmt.Errorf("hydrate %s: %w", id, ErrInUse)
	}
	if err := d.openFiles(filepath.Join(c.opt.Dir, name)); err != nil {
		return nil, fmt.Errorf("hydration cache: %w", err)
	}
	c.used.Add(d.held.Load() - c.idle[name].bytes)
	delete(c.idle, name)
	c.open[name] = d
	return d, nil
}

func (d *Disk) openFiles(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	data, err := os.OpenFile(filepath.Join(dir, "data"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	d.data, d.fd = data, int(data.Fd())
	var fresh bool
	if d.log, fresh, err = openMap(filepath.Join(dir, "map"), d.head, d.apply); err != nil {
		return errors.Join(err, data.Close())
	}
	if fresh {
		err = data.Truncate(0)
	}
	if err == nil {
		err = data.Truncate(d.head.size)
	}
	if err != nil {
		return errors.Join(err, d.log.close(), data.Close())
	}
	return nil
}

// apply takes over what the map tells. Nobody reads yet.
func (d *Disk) apply(r record) {
	for u := r.unit; u < r.unit+int64(r.count); u++ {
		n := d.length(u)
		old, now := d.states.get(u), isZero
		if r.kind == kindData {
			now = unverified
			if d.sums == nil {
				d.sums = make([]uint32, d.head.units())
			}
			d.sums[u] = r.sum
		}
		d.states.swap(u, old, now)
		if old == absent {
			d.known.Add(n)
		}
		if old == unverified {
			d.held.Add(-n)
		}
		if now == unverified {
			d.held.Add(n)
		}
	}
}

// length is that of a unit; the last may be shorter.
func (d *Disk) length(u int64) int64 { return min(d.head.unit, d.head.size-u*d.head.unit) }

// Size is the image's length in bytes.
func (d *Disk) Size() int64 { return d.head.size }

// Known is how many bytes of the image need not be read from it any more.
func (d *Disk) Known() int64 { return d.known.Load() }

// Complete tells whether the whole image is here.
func (d *Disk) Complete() bool { return !d.broken.Load() && d.known.Load() == d.head.size }

// Extents tells the image's own runs.
func (d *Disk) Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error {
	return d.src.Extents(ctx, off, length, yield)
}

// Has tells whether a range, within Size, need not be read from the image.
func (d *Disk) Has(off, length int64) bool {
	if d.broken.Load() {
		return false
	}
	for u := off / d.head.unit; u*d.head.unit < off+length; u++ {
		if s := d.states.get(u); s != present && s != isZero {
			return false
		}
	}
	return true
}

// ReadNow fills p from off, within Size, if all of it is in memory: in the
// page cache of the copy, or known to be zero. It never waits.
func (d *Disk) ReadNow(p []byte, off int64) bool {
	if d.noWait.Load() || !d.Has(off, int64(len(p))) {
		return false
	}
	read := int64(0)
	for len(p) > 0 {
		s, n := d.run(off, int64(len(p)))
		part := p[:n]
		if s == isZero {
			clear(part)
		} else {
			k, err := unix.Preadv2(d.fd, [][]byte{part}, off, unix.RWF_NOWAIT)
			if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
				d.noWait.Store(true)
			}
			if err != nil || k < len(part) {
				return false
			}
			read += n
		}
		p, off = p[n:], off+n
	}
	d.cache.read.Add(read)
	return true
}

// Run tells whether what is at off, within Size, is known to be zero, and for
// how many of the next n bytes the answer is the same.
func (d *Disk) Run(off, n int64) (zero bool, length int64) {
	s, length := d.run(off, n)
	return s == isZero, length
}

// run returns the state at off and how many of the next n bytes have it.
func (d *Disk) run(off, n int64) (state, int64) {
	u := off / d.head.unit
	s := d.states.get(u)
	end := (u + 1) * d.head.unit
	for ; end < off+n && d.states.get(end/d.head.unit) == s; end += d.head.unit {
	}
	return s, min(n, end-off)
}

// ReadAt fills p from off, both within Size: from the copy what is there, and
// from the image what is not, which is kept then.
func (d *Disk) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 || off > d.head.size || int64(len(p)) > d.head.size-off {
		return 0, fmt.Errorf("range %d+%d of an image of %d bytes: %w", off, len(p), d.head.size, syscall.EINVAL)
	}
	done := 0
	for done < len(p) {
		if d.broken.Load() {
			n, err := d.foreground(ctx, p[done:], off+int64(done))
			return done + n, err
		}
		at := off + int64(done)
		s, n := d.run(at, int64(len(p)-done))
		part := p[done : done+int(n)]
		switch s {
		case isZero:
			clear(part)
		case present:
			if _, err := d.data.ReadAt(part, at); err != nil {
				d.abandon("read", err)
				continue
			}
			d.cache.read.Add(n)
		case unverified:
			d.verify(at / d.head.unit)
			continue
		case absent:
			k, err := d.fetch(ctx, part, at)
			done += k
			if err != nil {
				return done, err
			}
			continue
		}
		done += int(n)
	}
	return done, nil
}

// foreground reads from the image for somebody who waits: hydration pauses.
func (d *Disk) foreground(ctx context.Context, p []byte, off int64) (int, error) {
	d.cache.gate.enter()
	defer d.cache.gate.leave()
	n, err := d.src.ReadAt(ctx, p, off)
	if err == nil && n < len(p) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// fetch reads the first bytes of p from the image, whole units where there are
// some, and keeps them. It returns how many.
func (d *Disk) fetch(ctx context.Context, p []byte, off int64) (int, error) {
	unit := d.head.unit
	u := off / unit
	whole := int64(len(p)) / unit * unit
	if off+int64(len(p)) == d.head.size {
		whole = int64(len(p))
	}
	if off%unit == 0 && whole > 0 {
		n, err := d.foreground(ctx, p[:whole], off)
		if err != nil {
			return n, err
		}
		for at := int64(0); at < whole; at += unit {
			d.keep(off/unit+at/unit, p[at:min(at+unit, whole)])
		}
		return n, nil
	}
	b := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(b)
	all := (*b)[:d.length(u)]
	part := p[:min(int64(len(p)), (u+1)*unit-off)]
	if _, err := d.foreground(ctx, all, u*unit); err != nil {
		// What fails may lie beside what was asked for.
		return d.foreground(ctx, part, off)
	}
	d.keep(u, all)
	return copy(part, all[off-u*unit:]), nil
}

// zeroes is compared with.
var zeroes [64 << 10]byte

func allZero(b []byte) bool {
	for len(b) > len(zeroes) {
		if !bytes.Equal(b[:len(zeroes)], zeroes[:]) {
			return false
		}
		b = b[len(zeroes):]
	}
	return bytes.Equal(b, zeroes[:len(b)])
}

// keep adds a unit to the copy, if there is room.
func (d *Disk) keep(u int64, b []byte) {
	if d.states.get(u) != absent || d.broken.Load() {
		return
	}
	if allZero(b) {
		d.keepZero(u, u+1)
		return
	}
	n := int64(len(b))
	if !d.cache.reserve(n) {
		return
	}
	_, err := d.data.WriteAt(b, u*d.head.unit)
	if err != nil || !d.states.swap(u, absent, present) {
		d.cache.used.Add(-n)
		switch {
		case err == nil: // somebody else was first, with the same bytes
		case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG):
			d.cache.outOfSpace(err)
		default:
			d.abandon("write", err)
		}
		return
	}
	d.held.Add(n)
	d.note(record{unit: u, count: 1, kind: kindData, sum: crc32.Checksum(b, castagnoli)}, n)
}

// keepZero notes that the units [from, to) are zero.
func (d *Disk) keepZero(from, to int64) {
	for u := from; u < to; u++ {
		if d.states.swap(u, absent, isZero) {
			d.note(record{unit: u, count: 1, kind: kindZero}, d.length(u))
		}
	}
}

// note remembers a unit for the map.
func (d *Disk) note(r record, n int64) {
	d.known.Add(n)
	d.cache.filled.Add(n)
	d.mu.Lock()
	last := len(d.pending) - 1
	if r.kind == kindZero && last >= 0 && d.pending[last].kind == kindZero &&
		d.pending[last].unit+int64(d.pending[last].count) == r.unit && d.pending[last].count < 1<<32-1 {
		d.pending[last].count++
	} else {
		d.pending = append(d.pending, r)
	}
	due := false
	if r.kind == kindData {
		if d.unsynced += n; d.unsynced >= syncEvery {
			due, d.unsynced = true, 0
		}
	}
	d.mu.Unlock()
	if due && d.ctx.Err() == nil {
		d.tasks.Go(d.sync)
	}
}

// sync makes what arrived durable: first the data, then the map.
func (d *Disk) sync() {
	d.syncing.Lock()
	defer d.syncing.Unlock()
	d.mu.Lock()
	pending := d.pending
	d.pending, d.unsynced = nil, 0
	d.mu.Unlock()
	if len(pending) == 0 || d.broken.Load() {
		return
	}
	if err := d.syncData(); err != nil {
		// What the kernel holds is unknown from now on.
		d.abandon("sync", err)
		return
	}
	end := d.log.end
	err := d.log.append(pending)
	switch {
	case err == nil:
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		d.log.end = end
		d.mu.Lock()
		d.pending = append(pending, d.pending...) // room may come
		d.mu.Unlock()
		d.cache.outOfSpace(err)
	default:
		d.abandon("write the map of", err)
	}
}

// verify compares a unit that an earlier process wrote with its checksum.
func (d *Disk) verify(u int64) {
	b := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(b)
	all := (*b)[:d.length(u)]
	if _, err := d.data.ReadAt(all, u*d.head.unit); err != nil {
		d.abandon("read", err)
		return
	}
	if crc32.Checksum(all, castagnoli) == d.sums[u] {
		d.states.swap(u, unverified, present)
		return
	}
	if d.states.swap(u, unverified, absent) {
		n := int64(len(all))
		d.known.Add(-n)
		d.held.Add(-n)
		d.cache.used.Add(-n)
		d.cache.log.Warn("a block of the hydration cache is damaged; it is read from the repository again",
			"id", d.head.id, "offset", u*d.head.unit)
	}
}

// abandon stops using the copy: everything is read from the image.
func (d *Disk) abandon(what string, err error) {
	if !d.broken.Swap(true) {
		d.cancel() // hydration has nowhere to put anything
		d.cache.log.Error("cannot "+what+" a copy in the hydration cache; its disk is read from the repository from now on",
			"directory", filepath.Join(d.cache.opt.Dir, d.name), "err", err)
	}
}

// Close ends hydration and the use of the copy, which stays if the cache keeps
// copies and it is sound.
func (d *Disk) Close() error {
	d.cancel()
	d.tasks.Wait()
	c := d.cache
	keep := c.opt.Keep
	if keep {
		d.sync()
	}
	keep = keep && !d.broken.Load()
	err := errors.Join(d.log.close(), d.data.Close())
	dir := filepath.Join(c.opt.Dir, d.name)
	if keep {
		now := time.Now()
		_ = os.Chtimes(filepath.Join(dir, "data"), now, now) // the order of eviction, no more
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, d.name)
	if keep {
		c.idle[d.name] = idleCopy{bytes: d.held.Load(), last: time.Now()}
		return err
	}
	c.used.Add(-d.held.Load())
	c.roomAgain()
	return errors.Join(err, removeCopy(dir))
}

package hydrate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	defaultUnit = 1 << 20
	minUnit     = 4 << 10
	maxUnit     = 64 << 20
	// syncEvery is how many bytes are fetched between two syncs: a crash may lose this much.
	syncEvery = 128 << 20
)

// Disk is an image with its local copy.
type Disk struct {
	cache *Cache
	src   Source
	head  header
	name  string // of the directory
	data  *os.File
	fd    int
	log   *mapLog

	states states
	sums   []uint32     // of units that an earlier process wrote; nil if none
	held   atomic.Int64 // bytes of data
	known  atomic.Int64 // bytes that need not be read from the image: data and zeroes
	broken atomic.Bool  // the copy is not used any more
	noWait atomic.Bool  // the file system cannot read without waiting

	buffers sync.Pool // of one unit

	mu       sync.Mutex
	pending  []record // not in the map yet
	unsynced int64

	syncing  sync.Mutex
	syncData func() error // a field so that tests can make it fail

	begin  sync.Once
	ctx    context.Context // of the disk's hydration, which outlives the call that starts it
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	errors atomic.Int64 // consecutive failed background reads
}

// Open opens the copy of an image, or starts one. id identifies the image's content, such as
// a recovery point's ID: 1 to 200 bytes. unit is a power of two from 4 KiB to 64 MiB, best
// the image's block size; 0 for 1 MiB. A copy of another size or unit is discarded.
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
	if err := d.openFiles(); err != nil {
		return nil, fmt.Errorf("hydration cache: %w", err)
	}
	c.used.Add(d.held.Load() - c.idle[name].bytes)
	delete(c.idle, name)
	c.open[name] = d
	return d, nil
}

func (d *Disk) openFiles() error {
	if err := d.cache.root.MkdirAll(d.name, 0o700); err != nil {
		return err
	}
	dir, err := d.cache.root.OpenRoot(d.name)
	if err != nil {
		return err
	}
	defer dir.Close()
	data, err := dir.OpenFile("data", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	d.data, d.fd = data, int(data.Fd())
	var fresh bool
	if d.log, fresh, err = openMap(dir, d.head, d.apply); err != nil {
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

// apply applies a record of the map. There is no reader yet.
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

// length returns the length of a unit; the last may be shorter.
func (d *Disk) length(u int64) int64 { return min(d.head.unit, d.head.size-u*d.head.unit) }

// Size returns the image's size in bytes.
func (d *Disk) Size() int64 { return d.head.size }

// Known returns how many bytes of the image need not be read from it any more.
func (d *Disk) Known() int64 { return d.known.Load() }

// Complete reports whether the copy is complete.
func (d *Disk) Complete() bool { return !d.broken.Load() && d.known.Load() == d.head.size }

// Extents reports the image's own runs.
func (d *Disk) Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error {
	return d.src.Extents(ctx, off, length, yield)
}

// Has reports whether a range, within Size, need not be read from the image.
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

// Run reports whether the bytes at off, within Size, are known to be zero, and for how many
// of the next n bytes the answer is the same.
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

// Close ends hydration and closes the copy, which is kept if the cache keeps copies and it is
// intact.
func (d *Disk) Close() error {
	d.mu.Lock()
	d.cancel()
	d.mu.Unlock()
	d.tasks.Wait()
	c := d.cache
	keep := c.opt.Keep
	if keep {
		d.sync()
	}
	keep = keep && !d.broken.Load()
	err := errors.Join(d.log.close(), d.data.Close())
	if keep {
		now := time.Now()
		_ = c.root.Chtimes(filepath.Join(d.name, "data"), now, now) // only for the order of eviction
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
	return errors.Join(err, c.removeCopy(d.name))
}

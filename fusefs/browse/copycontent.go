package browse

import (
	"errors"
	"os"
	"sync"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// content writes a regular file's data. The rest stays a hole, and so does what cannot be
// read, unless that is everything.
func (c *copier) content(e *Entry, p place) (err error) {
	src, err := e.Open()
	if err != nil {
		return reading(err)
	}
	defer src.Close()
	out, err := p.create()
	if err != nil {
		return err
	}
	r := ranges{c: c, src: src, out: out}
	err = r.all(e.Stat.Size)
	if err == nil {
		err = out.Truncate(e.Stat.Size)
	}
	lost := r.lost.err()
	if err == nil && lost != nil && r.got == 0 {
		err = reading(r.lost.faults.Err())
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return errors.Join(err, p.remove())
	}
	if lost != nil {
		if err := c.failed(e.Path, "", reading(lost)); err != nil {
			return errors.Join(err, p.remove())
		}
	}
	return nil
}

// all copies all ranges with data, each by a free worker, the last one here, so that this
// worker does not wait idly.
func (r *ranges) all(size int64) error {
	var last diskfs.Extent
	var lost damage
	err := eachData(r.src, size, &lost, func(x diskfs.Extent) error {
		for off := x.Offset; off < x.Offset+x.Length; {
			if last.Length > 0 && !r.copy(last) {
				return errStop
			}
			last = diskfs.Extent{Offset: off, Length: min(copyUnit, x.Offset+x.Length-off)}
			off += last.Length
		}
		return nil
	})
	if last.Length > 0 && err == nil {
		r.copyHere(last)
	}
	if failed := r.wait(); failed != nil || errors.Is(err, errStop) {
		return failed
	}
	if lost.bytes > 0 {
		r.lost.merge(&lost)
	}
	return reading(err)
}

// errStop ends a walk over ranges after one could not be copied.
var errStop = errors.New("stop")

// copyUnit is the unit of one worker's copy, in bytes.
const copyUnit = 1 << 20

var copyBuffers = sync.Pool{New: func() any { return new([copyUnit]byte) }}

// ranges copies the ranges of one file, as many at once as there are workers free.
type ranges struct {
	c    *copier
	src  diskfs.File
	out  *os.File
	busy sync.WaitGroup

	mu   sync.Mutex // guards the following
	err  error      // the first
	lost damage
	got  int64 // bytes that could be read
}

// copy copies a range, perhaps later; false if one has failed.
func (r *ranges) copy(x diskfs.Extent) bool {
	r.mu.Lock()
	failed := r.err != nil
	r.mu.Unlock()
	if failed {
		return false
	}
	r.busy.Add(1)
	// The caller is a worker itself: it must not wait for another.
	if !r.c.group.TryGo(func() error {
		defer r.busy.Done()
		r.copyHere(x)
		return nil // reported by wait, with the file's name
	}) {
		r.copyHere(x)
		r.busy.Done()
	}
	return true
}

// copyHere copies a range and records a failure.
func (r *ranges) copyHere(x diskfs.Extent) {
	if err := r.one(x.Offset, x.Length); err != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.err == nil {
			r.err = err
		}
	}
}

func (r *ranges) wait() error {
	r.busy.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

func (r *ranges) one(off, n int64) error {
	if err := r.c.ctx.Err(); err != nil {
		return err
	}
	buf := copyBuffers.Get().(*[copyUnit]byte) // the pool has nothing else
	defer copyBuffers.Put(buf)
	var lost damage
	p := buf[:n]
	if err := salvage(r.src, p, off, &lost); err != nil {
		return reading(err)
	}
	r.mu.Lock()
	r.lost.merge(&lost)
	r.got += n - lost.bytes
	r.mu.Unlock()
	if lost.bytes == n {
		return nil // stays a hole
	}
	if _, err := r.out.WriteAt(p, off); err != nil {
		return err
	}
	r.c.bytes.Add(n)
	if r.c.opt.Copied != nil {
		r.c.opt.Copied(n)
	}
	return nil
}

package hydrate

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// stride is how much of an image one call of Extents covers.
	stride = 1 << 30
	// window is how much data is listed before its fetching begins.
	window = 64 << 20
	// giveUpAfter is the number of consecutive failures that end a pass: the repository is
	// out of reach.
	giveUpAfter = 16
	// niceness of the workers' threads, so that a busy processor serves readers first, too.
	niceness = 10
)

// job is a unit to fetch.
type job struct {
	d    *Disk
	unit int64
	done *sync.WaitGroup
}

// gate pauses hydration while readers wait for the image.
type gate struct {
	readers atomic.Int64
	waiting atomic.Int64
	mu      sync.Mutex
	free    *sync.Cond
}

func (g *gate) init() { g.free = sync.NewCond(&g.mu) }

func (g *gate) enter() { g.readers.Add(1) }

func (g *gate) leave() {
	if g.readers.Add(-1) == 0 && g.waiting.Load() > 0 {
		g.wake()
	}
}

func (g *gate) wake() {
	g.mu.Lock()
	g.free.Broadcast()
	g.mu.Unlock()
}

// wait returns once no reader waits for an image, or ctx ends.
func (g *gate) wait(ctx context.Context) {
	if g.readers.Load() == 0 {
		return
	}
	stop := context.AfterFunc(ctx, g.wake)
	defer stop()
	g.waiting.Add(1)
	defer g.waiting.Add(-1)
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.readers.Load() > 0 && ctx.Err() == nil {
		g.free.Wait()
	}
}

// Start fetches the whole image in the background. It returns at once; hydration ends with
// Close, when the image is complete, or when there is no more room.
func (d *Disk) Start() {
	d.begin.Do(func() {
		if d.ctx.Err() != nil {
			return
		}
		if d.Complete() {
			d.tellWhole()
			return
		}
		d.cache.start.Do(func() {
			for range d.cache.opt.Workers {
				d.cache.workers.Go(d.cache.work)
			}
		})
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.ctx.Err() == nil {
			d.tasks.Go(d.hydrate)
		}
	})
}

func (d *Disk) tellWhole() {
	d.cache.log.Info("an image is here as a whole", "id", d.head.id, "bytes", d.held.Load(), "size", d.head.size)
}

// work fetches units for all disks of the cache.
func (c *Cache) work() {
	// The thread ends with the goroutine, since it is not unlocked, so that no other
	// goroutine inherits its priority.
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), niceness)
	var buf []byte
	for {
		select {
		case <-c.ctx.Done():
			return
		case j := <-c.jobs:
			c.gate.wait(j.d.ctx)
			if n := j.d.length(j.unit); int64(len(buf)) < n {
				buf = make([]byte, n)
			}
			j.d.fill(j.unit, buf)
			j.done.Done()
		}
	}
}

// fill fetches a unit in the background.
func (d *Disk) fill(u int64, buf []byte) {
	if d.ctx.Err() != nil || d.states.get(u) != absent {
		return
	}
	b := buf[:d.length(u)]
	var err error
	if once, ok := d.src.(OnceReader); ok {
		err = once.ReadOnce(d.ctx, b, u*d.head.unit)
	} else {
		_, err = d.src.ReadAt(d.ctx, b, u*d.head.unit)
	}
	if err == nil {
		d.errors.Store(0)
		d.keep(u, b)
		return
	}
	if d.ctx.Err() == nil && d.errors.Add(1) == 1 {
		d.cache.log.Warn("cannot fetch a block in the background; hydration continues with others and retries later",
			"id", d.head.id, "offset", u*d.head.unit, "err", err)
	}
}

var errEnded = errors.New("hydration ends")

// hydrate makes passes over the image until it is complete.
func (d *Disk) hydrate() {
	for {
		err := d.pass()
		d.sync()
		switch {
		case d.Complete():
			d.tellWhole()
			return
		case errors.Is(err, errEnded) || d.ctx.Err() != nil:
			return
		case err != nil && d.errors.Add(1) == 1:
			d.cache.log.Warn("cannot find blocks to fetch in the background; retrying later", "id", d.head.id, "err", err)
		}
		retry := time.NewTimer(d.cache.opt.Retry)
		select {
		case <-d.ctx.Done():
			retry.Stop()
			return
		case <-retry.C:
		}
		d.errors.Store(0)
	}
}

// pass fetches absent units, in order.
func (d *Disk) pass() error {
	p := &pass{d: d}
	defer p.flight.Wait()
	for p.told < d.head.size {
		from := p.told
		var failed error
		err := d.src.Extents(d.ctx, from, min(stride, d.head.size-from), func(n int64, _, zero bool) bool {
			failed = p.extent(n, zero)
			return failed == nil
		})
		switch {
		case failed != nil:
			return failed
		case err != nil:
			return err
		case p.told <= from:
			return errors.New("the image tells no extents")
		}
	}
	return p.flush()
}

// pass is one pass over an image.
type pass struct {
	d      *Disk
	flight sync.WaitGroup // units being fetched
	told   int64          // end of the extents listed so far
	start  int64          // start of the current run
	zero   bool           // its kind
	next   int64          // units below are done
}

// extent adds the next extent; neighbours of one kind form one run.
func (p *pass) extent(n int64, zero bool) error {
	if zero != p.zero {
		if err := p.flush(); err != nil {
			return err
		}
		p.start, p.zero = p.told, zero
	}
	p.told += n
	if !zero && p.told-p.start >= window {
		return p.flush()
	}
	return p.d.ctx.Err()
}

// flush processes the run. Partial units of a zero run are fetched, since they share the unit
// with other bytes.
func (p *pass) flush() error {
	unit := p.d.head.unit
	from, to := max(p.start/unit, p.next), (p.told+unit-1)/unit
	zeroFrom, zeroTo := to, to
	if p.zero {
		zeroFrom, zeroTo = (p.start+unit-1)/unit, p.told/unit
		if p.told >= p.d.head.size {
			zeroTo = to
		}
	}
	for u := from; u < to; u++ {
		if zeroFrom <= u && u < zeroTo {
			p.d.keepZero(u, zeroTo)
			u = zeroTo - 1
			continue
		}
		if err := p.d.enqueue(u, &p.flight); err != nil {
			return err
		}
	}
	p.start, p.next = p.told, max(p.next, to)
	return nil
}

// enqueue hands an absent unit to the workers.
func (d *Disk) enqueue(u int64, flight *sync.WaitGroup) error {
	switch {
	case d.states.get(u) != absent:
		return nil
	case d.cache.full(d.length(u)):
		return errEnded
	case d.errors.Load() >= giveUpAfter:
		return errors.New("the image cannot be read")
	}
	flight.Add(1)
	select {
	case d.cache.jobs <- job{d: d, unit: u, done: flight}:
		return nil
	case <-d.ctx.Done():
		flight.Done()
		return d.ctx.Err()
	}
}

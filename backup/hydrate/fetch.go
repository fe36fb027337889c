package hydrate

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"
	"syscall"

	"github.com/varve-io/varve/internal/zero"
)

// ReadAt fills p from off, both within Size, from the copy if present, else from the image;
// then the copy keeps it.
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

// foreground reads from the image for a waiting reader: hydration pauses.
func (d *Disk) foreground(ctx context.Context, p []byte, off int64) (int, error) {
	d.cache.gate.enter()
	defer d.cache.gate.leave()
	n, err := d.src.ReadAt(ctx, p, off)
	if err == nil && n < len(p) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// fetch reads the first bytes of p from the image, in whole units if possible, and keeps
// them. It returns their number.
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
		// The failure may be outside the requested range.
		return d.foreground(ctx, part, off)
	}
	d.keep(u, all)
	return copy(part, all[off-u*unit:]), nil
}

// keep adds a unit to the copy, if there is room.
func (d *Disk) keep(u int64, b []byte) {
	if d.states.get(u) != absent || d.broken.Load() {
		return
	}
	if zero.Only(b) {
		d.keepZero(u, u+1)
		return
	}
	n := int64(len(b))
	if !d.cache.reserve(n) {
		return
	}
	removed := d.cache.removed.Load()
	_, err := d.data.WriteAt(b, u*d.head.unit)
	if err != nil || !d.states.swap(u, absent, present) {
		d.cache.used.Add(-n)
		switch {
		case err == nil: // another reader was first, with the same bytes
		case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG):
			d.cache.outOfSpace(err, removed)
		default:
			d.abandon("write", err)
		}
		return
	}
	d.held.Add(n)
	d.note(record{unit: u, count: 1, kind: kindData, sum: crc32.Checksum(b, castagnoli)}, n)
}

// keepZero records that the units [from, to) are zero.
func (d *Disk) keepZero(from, to int64) {
	for u := from; u < to; u++ {
		if d.states.swap(u, absent, isZero) {
			d.note(record{unit: u, count: 1, kind: kindZero}, d.length(u))
		}
	}
}

// note records a unit for the map.
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
	if due && d.ctx.Err() == nil { // which Close ends with the lock held
		d.tasks.Go(d.sync)
	}
	d.mu.Unlock()
}

// sync makes what was fetched durable: first the data, then the map.
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
		// The content of the page cache is unknown from now on.
		d.abandon("sync", err)
		return
	}
	end, removed := d.log.end, d.cache.removed.Load()
	err := d.log.append(pending)
	switch {
	case err == nil:
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		d.log.end = end
		d.mu.Lock()
		d.pending = append(pending, d.pending...) // space may become free
		d.mu.Unlock()
		d.cache.outOfSpace(err, removed)
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
		d.cancel() // hydration cannot store anything
		d.cache.log.Error("cannot "+what+" a copy in the hydration cache; its disk is read from the repository from now on",
			"directory", filepath.Join(d.cache.opt.Dir, d.name), "err", err)
	}
}

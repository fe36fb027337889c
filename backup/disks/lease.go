package disks

import (
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// Rule says when a held point gets the lease that protects it from prune. If no lease can be
// had, because the repository is read-only or its storage full, the point is read anyway and
// the log says so: reading must not depend on writing.
//
// The lease is on the one point, even if it belongs to a group: no part of a group is
// deleted, so prune and forget keep the others, and say which point is in use.
type Rule int

// The rules.
const (
	// AtOnce takes the lease before Hold returns: half a copy is worthless.
	AtOnce Rule = iota
	// Late takes it once the point has been held for some seconds. A quick look writes
	// nothing to the repository; a point deleted in that time fails to read as it would have
	// a moment earlier.
	Late
	// Idle takes it in the background with each use (Disk.Use), and releases it some minutes
	// after the last (Disks.ReleaseIdle).
	Idle
	// OnDemand takes it with Disk.Stay, in the background if the disk is not written to, or with Disk.Lease.
	OnDemand
)

const (
	// lateAfter is the longest quick look.
	lateAfter = 5 * time.Second
	// IdleTime is how long a point keeps its lease after its last use.
	IdleTime = 10 * time.Minute
)

// Lease takes the lease of the point, if it has none. The error is points.ErrNoSuchPoint if
// the point was deleted, or that of ctx.
func (d *Disk) Lease(ctx context.Context) error {
	// Varve does not prune another program's snapshots.
	if !d.set.repo.Writable() || d.point.Foreign != "" {
		return nil
	}
	d.leasing.Lock()
	defer d.leasing.Unlock()
	if d.lease != nil || d.gone {
		return nil
	}
	inTime, cancel := d.set.inTime(ctx)
	defer cancel()
	l, err := points.AcquireLease(inTime, d.set.repo, d.point, d.set.opt.Purpose)
	switch {
	case err == nil:
		d.lease = l
		d.leased.Store(true)
	case errors.Is(err, points.ErrNoSuchPoint), ctx.Err() != nil:
		return err
	case !errors.Is(err, repository.ErrReadOnly):
		d.warn(ctx, err)
	}
	return nil
}

func (d *Disk) warn(ctx context.Context, err error) {
	d.set.log.WarnContext(ctx, "reading without a lease: prune can delete the recovery point while it is read", "point", d.point.Name(), "error", Cause(err))
}

// Cause returns the cause of a failed write to storage, without its context and advice, for
// work that continues without it.
func Cause(err error) error {
	var system syscall.Errno
	switch {
	case errors.Is(err, repository.ErrStorageFull):
		return repository.ErrStorageFull
	case errors.As(err, &system):
		return system
	default:
		return err
	}
}

// releaseLease releases the lease, and prevents another if the disk is gone.
func (d *Disk) releaseLease(ctx context.Context, gone bool) {
	d.leasing.Lock()
	defer d.leasing.Unlock()
	l := d.lease
	d.lease, d.gone = nil, gone
	d.leased.Store(false)
	if l == nil {
		return
	}
	if err := l.Close(ctx); err != nil {
		d.set.log.WarnContext(ctx, "cannot release a lease; it expires by itself", "point", d.point.Name(), "error", err)
	}
}

// inBackground runs fn, which must end with s.ctx; Close waits for it.
func (s *Disks) inBackground(fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.background.Go(fn)
	}
}

// leaseInBackground takes the lease for inBackground, where no caller gets the error.
func (d *Disk) leaseInBackground() {
	if err := d.Lease(d.set.ctx); err != nil && d.set.ctx.Err() == nil {
		if errors.Is(err, points.ErrNoSuchPoint) {
			d.deleted.Store(&err)
		}
		d.warn(d.set.ctx, err)
	}
}

// leaseSoon takes the lease in the background, unless it is there or on its way.
func (d *Disk) leaseSoon() {
	if !d.leased.Load() && !d.leased.Swap(true) {
		d.set.inBackground(d.leaseInBackground)
	}
}

// Deleted is points.ErrNoSuchPoint once a lease in the background found that the point was deleted before it, else nil.
func (d *Disk) Deleted() error {
	if err := d.deleted.Load(); err != nil {
		return *err
	}
	return nil
}

func (d *Disk) leaseLate() {
	late := d.set.late()
	d.set.inBackground(func() {
		select {
		case <-d.set.ctx.Done():
		case <-late:
			d.leaseInBackground()
		}
	})
}

// Use records that the disk is being read, for the rule Idle. It does not wait for the lease:
// writing that to storage would delay the reader for nothing.
func (d *Disk) Use() {
	d.used.Store(time.Now().UnixNano())
	if d.set.opt.Lease == Idle {
		d.leaseSoon()
	}
}

// Begin records a use that lasts until End.
func (d *Disk) Begin() {
	d.Use()
	d.lasting.Add(1)
}

// End ends a use that Begin began.
func (d *Disk) End() {
	d.Use()
	d.lasting.Add(-1)
}

// Idle reports whether the disk has not been used for IdleTime.
func (d *Disk) Idle() bool {
	return d.lasting.Load() == 0 && time.Since(time.Unix(0, d.used.Load())) >= IdleTime
}

// ReleaseIdle releases the leases of idle disks. Under the rule Idle, call it from time to
// time; the next use takes the lease again.
func (s *Disks) ReleaseIdle(ctx context.Context) {
	var idle []*Disk
	s.each(func(d *Disk) {
		if d.Idle() {
			idle = append(idle, d)
		}
	})
	for _, d := range idle {
		d.releaseLease(ctx, false)
	}
}

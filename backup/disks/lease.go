package disks

import (
	"context"
	"errors"
	"fmt"
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

// errNoLease wraps why a lease cannot be had now.
var errNoLease = errors.New("no lease")

// Lease takes the lease of the point, if it has none. The error is points.ErrNoSuchPoint if
// the point was deleted, or that of ctx. A lease that cannot be had is tried again in the background.
func (d *Disk) Lease(ctx context.Context) error {
	err := d.takeLease(ctx)
	if errors.Is(err, errNoLease) {
		d.warn(ctx, err)
		d.leaseAgain()
		return nil
	}
	return err
}

// takeLease is Lease, but that the error is errNoLease if there is none.
func (d *Disk) takeLease(ctx context.Context) error {
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
		d.deleted.Store(nil) // prune put the point back
		return nil
	case errors.Is(err, points.ErrNoSuchPoint), ctx.Err() != nil:
		return err
	case errors.Is(err, repository.ErrReadOnly):
		return nil
	default:
		return fmt.Errorf("%w: %w", errNoLease, err)
	}
}

func (d *Disk) hasLease() bool {
	d.leasing.Lock()
	defer d.leasing.Unlock()
	return d.lease != nil
}

// leaseAgain takes the lease later: a reader may stay for days, and a storage fail for a minute.
func (d *Disk) leaseAgain() {
	if d.again.Swap(true) {
		return
	}
	d.leased.Store(true) // on its way
	d.set.inBackground(func() {
		defer d.again.Store(false)
		for try := 0; ; try++ {
			select {
			case <-d.set.ctx.Done():
				return
			case <-d.set.again(try):
			}
			if !d.leased.Load() {
				return // idle, or closed: the next use takes it
			}
			err := d.takeLease(d.set.ctx)
			if errors.Is(err, errNoLease) {
				d.set.log.DebugContext(d.set.ctx, "still no lease", "point", d.point.Name(), "error", Cause(err))
				continue
			}
			if err != nil {
				d.lost(err)
			} else if d.hasLease() {
				d.set.log.InfoContext(d.set.ctx, "the recovery point has its lease now: prune keeps it", "point", d.point.Name())
			}
			return
		}
	})
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

// releaseLease releases the lease, and prevents another.
func (d *Disk) releaseLease(ctx context.Context) {
	d.leasing.Lock()
	defer d.leasing.Unlock()
	d.gone = true
	d.leased.Store(false)
	d.dropLease(ctx)
}

// releaseIfIdle releases the lease of a disk that is still idle.
func (d *Disk) releaseIfIdle(ctx context.Context) {
	d.leasing.Lock()
	defer d.leasing.Unlock()
	d.leased.Store(false) // who begins to use it from here on takes another
	if d.Idle() {
		d.dropLease(ctx)
	} else {
		d.leased.Store(d.lease != nil)
	}
}

// dropLease releases the lease; the caller holds d.leasing.
func (d *Disk) dropLease(ctx context.Context) {
	l := d.lease
	d.lease = nil
	if l == nil {
		return
	}
	if err := l.Close(ctx); err != nil {
		d.set.log.WarnContext(ctx, "cannot release a lease now; it is tried again, and ends with this process", "point", d.point.Name(), "error", err)
		d.set.mu.Lock()
		d.set.unreleased = append(d.set.unreleased, l)
		d.set.mu.Unlock()
		return
	}
	d.set.releaseRest(ctx)
}

// releaseRest releases the leases that could not be released before: prune keeps their points as long as this process
// lives. The first failure ends it.
func (s *Disks) releaseRest(ctx context.Context) {
	s.mu.Lock()
	rest := s.unreleased
	s.unreleased = nil
	s.mu.Unlock()
	for i, l := range rest {
		if err := l.Close(ctx); err != nil {
			s.mu.Lock()
			s.unreleased = append(s.unreleased, rest[i:]...)
			s.mu.Unlock()
			return
		}
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
	if err := d.Lease(d.set.ctx); err != nil {
		d.lost(err)
	}
}

// lost notes why there will be no lease.
func (d *Disk) lost(err error) {
	if d.set.ctx.Err() != nil {
		return
	}
	if errors.Is(err, points.ErrNoSuchPoint) {
		d.deleted.Store(&err)
	}
	d.warn(d.set.ctx, err)
}

// leaseSoon takes the lease in the background, unless it is there or on its way.
func (d *Disk) leaseSoon() {
	if !d.leased.Load() && !d.leased.Swap(true) {
		d.set.inBackground(d.leaseInBackground)
	}
}

// Deleted is points.ErrNoSuchPoint once a lease in the background found that the point was deleted before it, until a
// lease finds it again; else nil.
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
	d.lasting.Add(1) // before Use, which may find a lease that releaseIfIdle looks at
	d.Use()
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
		d.releaseIfIdle(ctx)
	}
	s.releaseRest(ctx)
}

// leasePause is how long to wait before a lease is tried again, for the nth time.
func leasePause(n int) time.Duration {
	return min(time.Minute<<min(n, 3), 5*time.Minute)
}

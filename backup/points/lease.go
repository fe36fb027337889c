package points

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/process"
)

const (
	leaseKind        = "lease"
	leaseMaintenance = "maintenance" // the subject of the lease of a maintenance run

	// leaseTime is the duration of a lease, leaseRenew the interval at which it is renewed.
	leaseTime  = 30 * time.Minute
	leaseRenew = 5 * time.Minute
	// leaseSkew is added to the expiry of another host's lease, since clocks of hosts may be
	// hours apart. A reader killed on another host keeps its point that much longer.
	leaseSkew = 6 * time.Hour
	// leaseReturn bounds the release of a lease: if the storage does not answer, the lease
	// expires.
	leaseReturn = 30 * time.Second
)

// ErrLeased means that a point is in use.
var ErrLeased = errors.New("the recovery point is in use")

// ErrLeaseTaken means that another process holds an exclusive lease.
var ErrLeaseTaken = errors.New("already held")

// LeaseInfo describes a lease.
type LeaseInfo struct {
	Point   string    `json:"point"` // ID
	Purpose string    `json:"purpose"`
	Host    string    `json:"host"`
	PID     int       `json:"pid"`
	Boot    string    `json:"boot"`              // distinguishes boots and containers of a host
	Started string    `json:"started,omitempty"` // distinguishes processes with one PID: process.Start
	Since   time.Time `json:"since"`
	Expires time.Time `json:"expires"` // by the holder's clock

	record string
}

func (l LeaseInfo) String() string {
	return fmt.Sprintf("%s (process %d on %s, since %s)", l.Purpose, l.PID, l.Host, timeText(l.Since.Truncate(time.Second)))
}

// over reports whether the holder is gone: its process on this host and boot has ended, or
// the lease has expired, with a margin for skewed clocks.
func (l LeaseInfo) over(now time.Time) bool {
	if host, _ := os.Hostname(); host == l.Host && process.BootID() != "" && l.PID > 0 {
		if l.Boot == process.BootID() {
			return !process.Alive(l.PID, l.Started)
		}
		// Another boot or container of this host: only time decides.
	}
	return now.After(l.Expires.Add(leaseSkew))
}

// Lease keeps a recovery point from being pruned or forgotten while it is read. It is a
// record in the repository that a background goroutine renews until Close; that of
// ReserveLease is renewed by its owner. Safe for concurrent use.
type Lease struct {
	repo *repository.Repository // of the goroutine and Close; nil of a reserved lease
	info LeaseInfo

	stop context.CancelFunc // nil if no goroutine renews it
	done chan struct{}

	mu sync.Mutex // guards info.record
}

// AcquireLease takes a lease on a point; messages show purpose, for example "serve". A
// read-only connection cannot write one: the error is repository.ErrReadOnly, and the caller
// may continue without it, at the risk that the point is pruned and collected while it is
// read. The error is ErrNoSuchPoint if the point has been deleted.
func AcquireLease(ctx context.Context, r *repository.Repository, p *Point, purpose string) (*Lease, error) {
	l, err := acquire(ctx, r, p.ID, purpose)
	if errors.Is(err, repository.ErrReadOnly) {
		return nil, fmt.Errorf("no lease on %s: %w", p.Name(), err)
	}
	if err != nil {
		return nil, fmt.Errorf("lease on %s: %w", p.Name(), err)
	}
	// The lease is visible now. Deletion checks leases after it deletes; so if the point
	// still exists, it is protected.
	if err := Exists(ctx, r, p); err != nil {
		return nil, errors.Join(err, l.Close(ctx))
	}
	return l, nil
}

// ReserveLease takes a lease on the point with this ID for work that will begin later. It needs no open
// repository in between: the owner calls Renew, at the latest each LeaseRenewal, and then Release, with
// whichever connection it has. The errors are those of AcquireLease.
func ReserveLease(ctx context.Context, r *repository.Repository, id, purpose string) (*Lease, error) {
	l := newLease(r, id, purpose)
	if err := l.write(ctx, r); err != nil {
		return nil, fmt.Errorf("lease on %s: %w", id, err)
	}
	err := r.RefreshFlushed(ctx)
	var cat *Catalog
	if err == nil {
		cat, err = List(ctx, r, ListOptions{})
	}
	if err == nil && cat.ByID(id) == nil {
		err = deleted(ctx, r, id)
	}
	if err != nil {
		return nil, errors.Join(err, l.Release(ctx, r))
	}
	return l, nil
}

// LeaseRenewal is the longest time between two renewals of a lease: one may fail before it expires.
const LeaseRenewal = leaseTime / 2

// Renew extends a reserved lease.
func (l *Lease) Renew(ctx context.Context, r *repository.Repository) error {
	return l.write(ctx, r)
}

// Release ends a reserved lease.
func (l *Lease) Release(ctx context.Context, r *repository.Repository) error {
	return l.release(ctx, r, leaseReturn)
}

// AcquireMaintenance takes the exclusive lease of a maintenance run, or of work that no such
// run may overlap; ErrLeaseTaken if another process has it.
func AcquireMaintenance(ctx context.Context, r *repository.Repository, purpose string) (*Lease, error) {
	return acquire(ctx, r, leaseMaintenance, purpose)
}

// Exists fails with ErrNoSuchPoint if a point was deleted since it was listed.
func Exists(ctx context.Context, r *repository.Repository, p *Point) error {
	_, err := r.LoadSnapshot(ctx, p.ManifestID)
	if !errors.Is(err, repository.ErrSnapshotNotFound) {
		return err
	}
	// A change of its pins changes its manifest.
	cat, err := List(ctx, r, ListOptions{Volume: &p.Volume, Foreign: p.Foreign != ""})
	if err != nil || cat.ByID(p.ID) != nil {
		return err
	}
	return deleted(ctx, r, p.Name())
}

// deleted is the error of a point that is not in the list any more.
func deleted(ctx context.Context, r *repository.Repository, name string) error {
	unreadable, err := r.UnreadableManifests(ctx)
	if err != nil {
		return err
	}
	if len(unreadable) > 0 {
		u := unreadable[0]
		return fmt.Errorf("%w: %s is not in the list of recovery points any more, of which pack %s holds a part that cannot be read (%w); put the pack back from a copy of the storage",
			ErrDamaged, name, u.Pack, u.Err)
	}
	return fmt.Errorf("%w: %s has been deleted", ErrNoSuchPoint, name)
}

// acquire writes a lease. The lease of maintenance is exclusive: if another exists the error
// is ErrLeaseTaken, and of two taken at once, neither of which found the other, the one with
// the lower record ID wins.
func acquire(ctx context.Context, r *repository.Repository, point, purpose string) (*Lease, error) {
	exclusive := point == leaseMaintenance
	if exclusive {
		if err := r.Refresh(ctx); err != nil {
			return nil, err
		}
		others, err := leasesOn(ctx, r, point)
		if err != nil {
			return nil, err
		}
		if len(others) > 0 {
			return nil, fmt.Errorf("%w by %v", ErrLeaseTaken, others[0])
		}
	}
	l := newLease(r, point, purpose)
	l.repo = r
	if err := l.write(ctx, r); err != nil {
		return nil, err
	}
	first := l.info.record
	rctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l.stop, l.done = cancel, make(chan struct{})
	go l.renew(rctx)
	var err error
	if !exclusive {
		err = r.RefreshFlushed(ctx)
	} else if err = r.Refresh(ctx); err == nil {
		err = l.giveWay(ctx, first)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close(ctx))
	}
	return l, nil
}

// newLease returns a lease of this process that is not written yet.
func newLease(r *repository.Repository, point, purpose string) *Lease {
	host, _ := os.Hostname()
	return &Lease{info: LeaseInfo{
		Point: point, Purpose: purpose, Host: host, PID: os.Getpid(), Boot: process.BootID(),
		Started: process.Start(os.Getpid()), Since: r.Now().UTC(),
	}}
}

func (l *Lease) giveWay(ctx context.Context, record string) error {
	others, err := leasesOn(ctx, l.repo, l.info.Point)
	if err != nil {
		return err
	}
	for _, o := range others {
		if o.record < record {
			return fmt.Errorf("%w by %v", ErrLeaseTaken, o)
		}
	}
	return nil
}

// write replaces the lease's record. How far the storage's clock is ahead may be known only
// after the first write: then the lease is written again.
func (l *Lease) write(ctx context.Context, r *repository.Repository) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	ahead := max(r.StorageAhead(), 0)
	if err := l.writeDated(ctx, r, ahead); err != nil {
		return err
	}
	if now := max(r.StorageAhead(), 0); now != ahead {
		return l.writeDated(ctx, r, now)
	}
	return nil
}

// writeDated writes the lease with an expiry by a clock this far ahead of this machine's: a
// machine whose clock is days behind would write a lease that others take for expired. The
// caller holds l.mu.
func (l *Lease) writeDated(ctx context.Context, r *repository.Repository, ahead time.Duration) error {
	w, err := r.NewWriter(ctx, "varve lease")
	if err != nil {
		return err
	}
	defer w.Close()
	l.info.Expires = r.Now().UTC().Add(ahead + leaseTime)
	id, err := w.PutRecord(ctx, leaseKind, map[string]string{PointLabel: l.info.Point}, l.info)
	if err != nil {
		return err
	}
	if l.info.record != "" {
		if err := w.DeleteRecord(ctx, l.info.record); err != nil {
			return err
		}
	}
	if err := w.Flush(ctx); err != nil {
		return err
	}
	l.info.record = id
	return nil
}

func (l *Lease) renew(ctx context.Context) {
	defer close(l.done)
	t := time.NewTicker(leaseRenew)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := l.write(ctx, l.repo); err != nil && ctx.Err() == nil {
				// It lasts six renewals and a margin; the next may succeed.
				l.repo.Log().WarnContext(ctx, "could not renew a lease", "point", l.info.Point, "error", err)
			}
		}
	}
}

// Close releases the lease, even if ctx has ended. It waits for storage for half a minute,
// and the repository's grace after that; then the lease expires by itself.
func (l *Lease) Close(ctx context.Context) error {
	return l.release(ctx, l.repo, leaseReturn)
}

func (l *Lease) release(ctx context.Context, r *repository.Repository, atMost time.Duration) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), atMost)
	defer cancel()
	if l.stop != nil {
		l.stop()
		<-l.done
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.info.record == "" {
		return nil
	}
	w, err := r.NewWriter(ctx, "varve lease")
	if err != nil {
		return err
	}
	defer w.Close()
	if err := w.DeleteRecord(ctx, l.info.record); err != nil {
		return fmt.Errorf("release lease: %w", err)
	}
	if err := w.Flush(ctx); err != nil {
		return fmt.Errorf("release lease: %w", err)
	}
	l.info.record = ""
	return nil
}

// Leases returns the valid leases, by point ID. Refresh the repository first to see those of
// other processes.
func Leases(ctx context.Context, r *repository.Repository) (map[string][]LeaseInfo, error) {
	held, _, err := readLeases(ctx, r, nil)
	if err != nil {
		return nil, err
	}
	delete(held, leaseMaintenance)
	return held, nil
}

func leasesOn(ctx context.Context, r *repository.Repository, point string) ([]LeaseInfo, error) {
	held, _, err := readLeases(ctx, r, map[string]string{PointLabel: point})
	return held[point], err
}

func readLeases(ctx context.Context, r *repository.Repository, labels map[string]string) (held map[string][]LeaseInfo, over []LeaseInfo, err error) {
	recs, err := r.ListRecords(ctx, leaseKind, labels)
	if err != nil {
		return nil, nil, err
	}
	held = map[string][]LeaseInfo{}
	// A clock that is ahead would take all leases of other hosts for expired.
	now := r.Now().Add(min(r.StorageAhead(), 0))
	for _, rec := range recs {
		l, ok, err := LoadNote[LeaseInfo](ctx, r, rec)
		if err != nil {
			return nil, nil, err
		}
		if !ok {
			continue
		}
		l.record = rec.ID
		if l.over(now) {
			over = append(over, l)
		} else {
			held[l.Point] = append(held[l.Point], l)
		}
	}
	return held, over, nil
}

// DropExpiredLeases removes the leases of killed readers.
func DropExpiredLeases(ctx context.Context, r *repository.Repository) (int, error) {
	_, over, err := readLeases(ctx, r, nil)
	if err != nil || len(over) == 0 {
		return 0, err
	}
	w, err := r.NewWriter(ctx, "varve drop leases")
	if err != nil {
		return 0, err
	}
	defer w.Close()
	for _, l := range over {
		if err := w.DeleteRecord(ctx, l.record); err != nil {
			return 0, err
		}
	}
	return len(over), w.Flush(ctx)
}

package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/varve-io/varve/backup/repository"
)

const (
	leaseKind        = "lease"
	leaseMaintenance = "maintenance" // what the lease of a maintenance run is on

	// leaseTime is how long a lease says it lasts, leaseRenew how often it is
	// written again.
	leaseTime  = 30 * time.Minute
	leaseRenew = 5 * time.Minute
	// leaseSkew is added to what a lease of another host says, because clocks
	// of hosts may be hours apart. It is what a killed reader of another host
	// costs: its point is held that much longer.
	leaseSkew = 6 * time.Hour
	// leaseReturn is how long giving a lease back may take: where the storage has
	// gone away meanwhile, the lease runs out by itself.
	leaseReturn = 30 * time.Second
)

// ErrLeased means that a point is being read.
var ErrLeased = errors.New("the recovery point is in use")

var errLeaseTaken = errors.New("already held")

// LeaseInfo is a lease as others see it.
type LeaseInfo struct {
	Point   string    `json:"point"` // ID
	Purpose string    `json:"purpose"`
	Host    string    `json:"host"`
	PID     int       `json:"pid"`
	Boot    string    `json:"boot"`              // tells boots and containers of a host apart
	Started string    `json:"started,omitempty"` // tells processes of one PID apart: processStart
	Since   time.Time `json:"since"`
	Expires time.Time `json:"expires"` // by the holder's clock

	record string
}

func (l LeaseInfo) String() string {
	return fmt.Sprintf("%s (process %d on %s, since %s)", l.Purpose, l.PID, l.Host, timeText(l.Since.Truncate(time.Second)))
}

// over reports whether the holder is gone: a process of this host and boot that
// does not live, or a lease that ran out, by a margin for skewed clocks.
func (l LeaseInfo) over(now time.Time) bool {
	if host, _ := os.Hostname(); host == l.Host && bootID() != "" {
		if l.Boot == bootID() {
			return !processAlive(l.PID, l.Started)
		}
		// Another boot, or another container on this host: only time tells.
	}
	return now.After(l.Expires.Add(leaseSkew))
}

// Lease keeps a recovery point from being pruned or forgotten while somebody
// reads it. It is a record in the repository that a background goroutine renews
// until Close. Safe for concurrent use.
type Lease struct {
	repo *repository.Repository
	info LeaseInfo

	stop context.CancelFunc
	done chan struct{}

	mu sync.Mutex // guards info.record
}

// AcquireLease takes a lease on a point; purpose is shown to whoever meets it,
// for example "serve". A read-only connection cannot write one: the error is
// repository.ErrReadOnly, and the caller may go on without, at the risk that the
// point is pruned and collected under it. The error is ErrNoSuchPoint when the
// point was deleted meanwhile.
func AcquireLease(ctx context.Context, r *repository.Repository, p *Point, purpose string) (*Lease, error) {
	l, err := acquire(ctx, r, p.ID, purpose)
	if errors.Is(err, repository.ErrReadOnly) {
		return nil, fmt.Errorf("no lease on %s: %w", p.Name(), err)
	}
	if err != nil {
		return nil, fmt.Errorf("lease on %s: %w", p.Name(), err)
	}
	// The lease is visible now. Whoever deletes a point looks for leases before;
	// so if the point is still there, it is held.
	if err := stillThere(ctx, r, p); err != nil {
		return nil, errors.Join(err, l.Close(ctx))
	}
	return l, nil
}

// stillThere fails with ErrNoSuchPoint for a point that was deleted.
func stillThere(ctx context.Context, r *repository.Repository, p *Point) error {
	_, err := r.LoadSnapshot(ctx, p.ManifestID)
	if !errors.Is(err, repository.ErrSnapshotNotFound) {
		return err
	}
	// A change of its pins gives it another manifest.
	cat, err := List(ctx, r, ListOptions{Volume: &p.Volume, Foreign: p.Foreign != ""})
	if err != nil || cat.ByID(p.ID) != nil {
		return err
	}
	unreadable, err := r.UnreadableManifests(ctx)
	if err != nil {
		return err
	}
	if len(unreadable) > 0 {
		u := unreadable[0]
		return fmt.Errorf("%w: %s is not in the list of recovery points any more, of which pack %s holds a part that cannot be read (%w); put the pack back from a copy of the storage",
			ErrDamaged, p.Name(), u.Pack, u.Err)
	}
	return fmt.Errorf("%w: %s was deleted meanwhile", ErrNoSuchPoint, p.Name())
}

// acquire writes a lease. That of maintenance is exclusive: whoever finds one
// gives way with errLeaseTaken, and of two that come at once, so that neither
// found the other's, the one with the lower record ID goes on.
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
			return nil, fmt.Errorf("%w by %v", errLeaseTaken, others[0])
		}
	}
	host, _ := os.Hostname()
	l := &Lease{repo: r, done: make(chan struct{}), info: LeaseInfo{
		Point: point, Purpose: purpose, Host: host, PID: os.Getpid(), Boot: bootID(),
		Started: processStart(os.Getpid()), Since: r.Now().UTC(),
	}}
	if err := l.write(ctx); err != nil {
		return nil, err
	}
	first := l.info.record
	rctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l.stop = cancel
	go l.renew(rctx)
	err := r.Refresh(ctx)
	if err == nil && exclusive {
		err = l.giveWay(ctx, first)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close(ctx))
	}
	return l, nil
}

func (l *Lease) giveWay(ctx context.Context, record string) error {
	others, err := leasesOn(ctx, l.repo, l.info.Point)
	if err != nil {
		return err
	}
	for _, o := range others {
		if o.record < record {
			return fmt.Errorf("%w by %v", errLeaseTaken, o)
		}
	}
	return nil
}

// write puts the lease's record in place of the one before. How far the storage's clock is
// ahead may turn out with the first write only: then the lease is written once more.
func (l *Lease) write(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	ahead := max(l.repo.StorageAhead(), 0)
	if err := l.writeDated(ctx, ahead); err != nil {
		return err
	}
	if now := max(l.repo.StorageAhead(), 0); now != ahead {
		return l.writeDated(ctx, now)
	}
	return nil
}

// writeDated writes the lease as it runs by a clock that is so far ahead of this machine's:
// one that is days behind would date a lease that others take for expired. The caller
// holds l.mu.
func (l *Lease) writeDated(ctx context.Context, ahead time.Duration) error {
	w, err := l.repo.NewWriter(ctx, "varve lease")
	if err != nil {
		return err
	}
	defer w.Close()
	l.info.Expires = l.repo.Now().UTC().Add(ahead + leaseTime)
	id, err := w.PutRecord(ctx, leaseKind, map[string]string{pointLabel: l.info.Point}, l.info)
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
			if err := l.write(ctx); err != nil && ctx.Err() == nil {
				// It lasts six renewals, and a margin; the next may succeed.
				slog.WarnContext(ctx, "could not renew a lease", "point", l.info.Point, "error", err)
			}
		}
	}
}

// Close releases the lease, even if ctx has ended already. Storage that does not
// answer is waited for half a minute, and the repository's grace after that; the
// lease runs out by itself then.
func (l *Lease) Close(ctx context.Context) error {
	return l.release(ctx, leaseReturn)
}

func (l *Lease) release(ctx context.Context, atMost time.Duration) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), atMost)
	defer cancel()
	l.stop()
	<-l.done
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.info.record == "" {
		return nil
	}
	w, err := l.repo.NewWriter(ctx, "varve lease")
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

// Leases returns the leases that hold, by point ID. Refresh the repository
// first to see those of other processes.
func Leases(ctx context.Context, r *repository.Repository) (map[string][]LeaseInfo, error) {
	held, _, err := readLeases(ctx, r, nil)
	if err != nil {
		return nil, err
	}
	delete(held, leaseMaintenance)
	return held, nil
}

func leasesOn(ctx context.Context, r *repository.Repository, point string) ([]LeaseInfo, error) {
	held, _, err := readLeases(ctx, r, map[string]string{pointLabel: point})
	return held[point], err
}

func readLeases(ctx context.Context, r *repository.Repository, labels map[string]string) (held map[string][]LeaseInfo, over []LeaseInfo, err error) {
	recs, err := r.ListRecords(ctx, leaseKind, labels)
	if err != nil {
		return nil, nil, err
	}
	held = map[string][]LeaseInfo{}
	now := r.Now()
	for _, rec := range recs {
		l := LeaseInfo{record: rec.ID}
		ok, err := r.LoadRecord(ctx, rec.ID, &l)
		if err != nil {
			return nil, nil, err
		}
		if !ok {
			continue
		}
		if l.over(now) {
			over = append(over, l)
		} else {
			held[l.Point] = append(held[l.Point], l)
		}
	}
	return held, over, nil
}

// dropExpiredLeases removes what killed readers left.
func dropExpiredLeases(ctx context.Context, r *repository.Repository) (int, error) {
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

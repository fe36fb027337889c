package points

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/plain"
)

// What is stored beside recovery points is checked here when it is read. Any client that can
// write to the repository can write any of it:
//
//	what                                  it reaches                             rule
//	a manifest's user, host and path      names of points, exports, directories, Volume.Check for Varve's points,
//	(namespace, cluster, name)            metrics, logs                          plain text for foreign ones
//	a manifest's tags                     as the record's fields                 blocktree.Record.Check
//	a foreign point's manifest ID, size   as a point's ID and size               foreignPoint
//	a manifest's incomplete reason        lists                                  plain text
//	a manifest's run host, PID, boot      compared, kill(pid, 0)                 deadRun
//	a manifest's pins                     lists, and unpin by the exact label    cleaned where they are shown
//	lease, quarantine, verify: point      look-ups by ID                         ValidID, and equal to the label
//	lease: PID                            kill(pid, 0), /proc/PID                not negative; of 0 only time decides
//	lease: times                          names, JSON                            years 0 to 9999
//	lease: purpose, host, boot, started   errors, lists, compared                plain text
//	quarantine: name, reason              lists, metrics of counts only          plain text
//	verify: first, problems, read         lists                                  plain text, at most 20, bounded
//
// The record itself (varve.json) is checked by blocktree.DecodeRecord.

const (
	// MaxNote bounds a text of a note, maxLabel a short one, in bytes.
	MaxNote  = 4 << 10
	maxLabel = 256
)

// ErrNote means that a note was not written by Varve.
var ErrNote = errors.New("not written by Varve")

// note is a record about a point, which it names, and which checks and cleans itself.
type note[N any] interface {
	*N
	Of() string
	Check() error
}

// LoadNote reads a note. A note that is deleted or invalid is skipped (ok is false): it must
// not prevent reading the others.
func LoadNote[N any, P note[N]](ctx context.Context, r *repository.Repository, rec repository.Record) (n N, ok bool, err error) {
	var raw json.RawMessage
	if ok, err = r.LoadRecord(ctx, rec.ID, &raw); err != nil || !ok {
		return n, false, err
	}
	if n, err = decodeNote[N, P](raw, rec.Labels[PointLabel]); err != nil {
		r.Log().WarnContext(ctx, "a record about a recovery point is invalid; it is ignored", "record", rec.ID, "error", err)
		return n, false, nil
	}
	return n, true, nil
}

// decodeNote reads a note labelled with a point.
func decodeNote[N any, P note[N]](p []byte, point string) (n N, err error) {
	if err := json.Unmarshal(p, &n); err != nil {
		return n, fmt.Errorf("%w: %w", ErrNote, err)
	}
	if of := P(&n).Of(); of != point || !blocktree.ValidID(of) && of != leaseMaintenance {
		return n, fmt.Errorf("%w: it is of point %q and filed under %q", ErrNote, plain.Clip(of, maxLabel), plain.Clip(point, maxLabel))
	}
	return n, P(&n).Check()
}

// Of returns the ID of the point, or what else is leased.
func (l *LeaseInfo) Of() string { return l.Point }

// Check rejects a lease that no Varve writes, and makes its texts safe to show.
func (l *LeaseInfo) Check() error {
	if l.PID < 0 || !blocktree.ValidTime(l.Since) || !blocktree.ValidTime(l.Expires) {
		return fmt.Errorf("%w: a lease of process %d from %d to %d", ErrNote, l.PID, l.Since.Year(), l.Expires.Year())
	}
	cleanNote(maxLabel, &l.Purpose, &l.Host, &l.Boot, &l.Started)
	return nil
}

// Of is the ID of the point.
func (q *Quarantine) Of() string { return q.Point }

// Check rejects a mark that no Varve writes, and makes its texts safe to show.
func (q *Quarantine) Check() error {
	if !blocktree.ValidTime(q.Since) {
		return fmt.Errorf("%w: quarantined in the year %d", ErrNote, q.Since.Year())
	}
	cleanNote(2*maxLabel, &q.Name)
	cleanNote(MaxNote, &q.Reason)
	return nil
}

func cleanNote(limit int, list ...*string) {
	for _, s := range list {
		*s = plain.Clip(*s, limit)
	}
}

// checkSource rejects a snapshot whose source cannot be a volume's name. For other programs
// any printable text is allowed.
func (p *Point) checkSource(foreign bool) error {
	if !foreign {
		return p.Volume.Check()
	}
	for _, part := range []string{p.Volume.Namespace, p.Volume.Name, p.Volume.Cluster} {
		if !plain.Is(part) {
			return fmt.Errorf("its source %q has control characters", plain.Clip(p.Volume.FullName(), maxLabel))
		}
	}
	return nil
}

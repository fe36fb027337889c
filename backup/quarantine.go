package backup

import (
	"context"
	"time"

	"github.com/varve-io/varve/backup/repository"
)

// Quarantine marks a point that verify found damaged: no backup builds on it,
// and maintenance goes on without being stopped by it.
type Quarantine struct {
	Point  string    `json:"point"` // ID
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
}

const (
	quarantineKind = "quarantine"
	pointLabel     = "varve-point"
)

// Quarantined returns the quarantined points by ID.
func Quarantined(ctx context.Context, r *repository.Repository) (map[string]Quarantine, error) {
	recs, err := r.ListRecords(ctx, quarantineKind, nil)
	if err != nil {
		return nil, err
	}
	out := map[string]Quarantine{}
	for _, rec := range recs {
		var q Quarantine
		ok, err := r.LoadRecord(ctx, rec.ID, &q)
		if err != nil {
			return nil, err
		}
		if ok {
			out[q.Point] = q
		}
	}
	return out, nil
}

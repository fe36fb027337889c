package points

import (
	"context"
	"time"

	"github.com/varve-io/varve/backup/repository"
)

// Quarantine marks a point that verify or maintenance found damaged: no backup builds on it,
// prune does not count it as a copy, and maintenance skips its damage. Its intact parts can
// still be read.
type Quarantine struct {
	Point  string    `json:"point"` // ID
	Name   string    `json:"name,omitempty"`
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
}

const (
	// QuarantineKind is the kind of the records of quarantines.
	QuarantineKind = "quarantine"
	// PointLabel is the label of a record with the ID of its point.
	PointLabel = "varve-point"
)

// Quarantined returns the quarantined points by ID.
func Quarantined(ctx context.Context, r *repository.Repository) (map[string]Quarantine, error) {
	recs, err := r.ListRecords(ctx, QuarantineKind, nil)
	if err != nil {
		return nil, err
	}
	out := map[string]Quarantine{}
	for _, rec := range recs {
		q, ok, err := LoadNote[Quarantine](ctx, r, rec)
		if err != nil {
			return nil, err
		}
		if ok {
			out[q.Point] = q
		}
	}
	return out, nil
}

// SetQuarantine sets marks and lifts those of other points, by ID. A point marked before
// keeps its date and reason.
func SetQuarantine(ctx context.Context, r *repository.Repository, mark []Quarantine, lift []string) error {
	recs, err := r.ListRecords(ctx, QuarantineKind, nil)
	if err != nil {
		return err
	}
	byPoint := map[string][]repository.Record{}
	for _, rec := range recs {
		byPoint[rec.Labels[PointLabel]] = append(byPoint[rec.Labels[PointLabel]], rec)
	}
	var remove []repository.Record
	for _, id := range lift {
		remove = append(remove, byPoint[id]...)
	}
	var add []Quarantine
	for _, q := range mark {
		if len(byPoint[q.Point]) == 0 {
			add = append(add, q)
		}
	}
	if len(add)+len(remove) == 0 {
		return nil
	}
	w, err := r.NewWriter(ctx, "varve quarantine")
	if err != nil {
		return err
	}
	defer w.Close()
	for _, rec := range remove {
		if err := w.DeleteRecord(ctx, rec.ID); err != nil {
			return err
		}
	}
	for _, q := range add {
		if _, err := w.PutRecord(ctx, QuarantineKind, map[string]string{PointLabel: q.Point}, q); err != nil {
			return err
		}
	}
	if err := w.Flush(ctx); err != nil {
		return err
	}
	return r.Refresh(ctx)
}

package backup

import (
	"context"
	"time"

	"github.com/varve-io/varve/backup/repository"
)

// Quarantine marks a point that verify or maintenance found damaged: no backup
// builds on it, prune does not count it as a copy that was kept, and maintenance
// goes on without being stopped by it. What is intact of it can still be read.
type Quarantine struct {
	Point  string    `json:"point"` // ID
	Name   string    `json:"name,omitempty"`
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

// setQuarantine marks points and lifts the marks of others, by ID. A point
// marked before keeps its first date and reason.
func setQuarantine(ctx context.Context, r *repository.Repository, mark []Quarantine, lift []string) error {
	recs, err := r.ListRecords(ctx, quarantineKind, nil)
	if err != nil {
		return err
	}
	byPoint := map[string][]repository.Record{}
	for _, rec := range recs {
		byPoint[rec.Labels[pointLabel]] = append(byPoint[rec.Labels[pointLabel]], rec)
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
		if _, err := w.PutRecord(ctx, quarantineKind, map[string]string{pointLabel: q.Point}, q); err != nil {
			return err
		}
	}
	if err := w.Flush(ctx); err != nil {
		return err
	}
	return r.Refresh(ctx)
}

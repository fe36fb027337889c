package repository

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kopia/kopia/repo/maintenance"
)

// taskWholeFull records whole runs of full maintenance. The records of Kopia's tasks do
// not show a run that ended between two tasks.
const taskWholeFull maintenance.TaskType = "varve-full"

const (
	// retryShare is the share of a cycle's interval after which a failed or killed run is
	// retried: six hours for a daily one.
	retryShare = 4
	// settleTime bounds how long an interrupted run waits to put its schedule back.
	settleTime = 10 * time.Second
)

// scheduled makes the schedule reflect what was done. Kopia postpones the next run by a
// whole interval before it begins one, so that a run that fails counts as done.
type scheduled struct {
	r      *Repository
	w      *Writer
	before *maintenance.Schedule // from before Kopia moved it
	start  time.Time
	mode   maintenance.Mode
	params *maintenance.Params
}

func (r *Repository) schedule(w *Writer) (*scheduled, error) {
	s, err := maintenance.GetSchedule(w.ctx, w.w)
	if err != nil {
		return nil, fmt.Errorf("read maintenance schedule: %w", err)
	}
	return &scheduled{r: r, w: w, before: s}, nil
}

// begin is called once this process owns the run. If it is killed from here on, the run
// is retried after a share of the interval.
func (s *scheduled) begin(p maintenance.RunParameters) error {
	s.start, s.mode, s.params = s.r.Now(), p.Mode, p.Params
	return s.write(s.w.ctx, nil, s.soon)
}

// end writes the schedule after the run: the next one is due an interval after
// this began if it succeeded, at once if it was interrupted, and after a share of
// the interval if it failed.
func (s *scheduled) end(ctx context.Context, failed error) error {
	if s.params == nil {
		return failed // it never began
	}
	next := s.later
	switch {
	case failed != nil && errors.Is(ctx.Err(), context.Canceled):
		next = s.asBefore
	case failed != nil:
		next = s.soon
	}
	// The session may be at the end of its grace.
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTime)
	defer cancel()
	run := &maintenance.RunInfo{Start: s.start, End: s.r.Now(), Success: failed == nil}
	if failed != nil {
		run.Error = failed.Error()
		if errors.Is(ctx.Err(), context.Canceled) {
			run.Error = "interrupted"
		}
	}
	return errors.Join(failed, s.write(wctx, run, next))
}

func (s *scheduled) soon(interval time.Duration, _ time.Time) time.Time {
	return s.start.Add(interval / retryShare)
}

func (s *scheduled) later(interval time.Duration, _ time.Time) time.Time {
	return s.start.Add(interval)
}

func (s *scheduled) asBefore(_ time.Duration, before time.Time) time.Time { return before }

// write sets the next runs. A full run includes a quick one.
func (s *scheduled) write(ctx context.Context, run *maintenance.RunInfo, next func(interval time.Duration, before time.Time) time.Time) error {
	now, err := maintenance.GetSchedule(ctx, s.w.w)
	if err != nil {
		return fmt.Errorf("read maintenance schedule: %w", err)
	}
	now.NextQuickMaintenanceTime = next(s.params.QuickCycle.Interval, s.before.NextQuickMaintenanceTime)
	if s.mode == maintenance.ModeFull {
		now.NextFullMaintenanceTime = next(s.params.FullCycle.Interval, s.before.NextFullMaintenanceTime)
		if run != nil {
			now.ReportRun(taskWholeFull, *run)
		}
	}
	if err := maintenance.SetSchedule(ctx, s.w.w, now); err != nil {
		return fmt.Errorf("write maintenance schedule: %w", err)
	}
	return nil
}

// lastFull is the last full run, of Varve or of stock Kopia.
func lastFull(s *maintenance.Schedule) MaintenanceRun {
	whole, kopia := lastRun(s.Runs[taskWholeFull]), lastRun(s.Runs[maintenance.TaskSnapshotGarbageCollection])
	if kopia.Start.After(whole.End) {
		return kopia
	}
	return whole
}

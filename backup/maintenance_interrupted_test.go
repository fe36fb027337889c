package backup

import (
	"context"
	"maps"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// outOfTime is a context whose deadline passes when done is closed.
type outOfTime struct {
	context.Context
	done chan struct{}
}

func (c *outOfTime) Done() <-chan struct{} { return c.done }

func (c *outOfTime) Err() error {
	select {
	case <-c.done:
		return context.DeadlineExceeded
	default:
		return c.Context.Err()
	}
}

// A run of maintenance that was interrupted at any step is due again at once, one
// whose process was killed soon, and only one that ended well after its interval.
func TestInterruptedMaintenanceIsDueAgain(t *testing.T) {
	t.Parallel()
	// A loaded machine may need more than the usual grace to write that it was interrupted.
	r := openWith(t, repository.OpenOptions{ConfigFile: repotest.New(t).ConfigFile, Password: repotest.Password, Grace: time.Hour})
	chain(t, r, testVolume, 2, 1<<20)
	state := func() *repository.MaintenanceState {
		t.Helper()
		st, err := r.MaintenanceState(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	due := func() bool {
		t.Helper()
		st := state()
		return !st.NextFull.After(r.Now()) && !st.NextQuick.After(r.Now())
	}
	if !due() {
		t.Fatal("maintenance is not due in a new repository")
	}
	for _, mode := range []repository.MaintenanceMode{repository.MaintenanceAuto, repository.MaintenanceFull} {
		for _, at := range []string{"begun", "marked", "swept", "collected", "dropped"} {
			ctx, cancel := context.WithCancel(t.Context())
			seen := false
			_, err := Maintain(ctx, r, MaintainOptions{Mode: mode, NoSafety: true, step: func(s string) {
				if s != at {
					return
				}
				seen = true
				cancel()
				if at != "begun" {
					return
				}
				// What a process killed now leaves.
				if st := state(); st.NextFull.Before(r.Now().Add(time.Hour)) || st.NextFull.After(r.Now().Add(12*time.Hour)) {
					t.Errorf("a killed run would be due at %s", st.NextFull)
				}
			}})
			cancel()
			if !seen || err == nil {
				t.Fatalf("interrupted at %s (%v): %v", at, seen, err)
			}
			st := state()
			if !due() || st.LastFull.Err != "interrupted" {
				t.Errorf("interrupted at %s: full due %s, quick due %s, the last one ended with %q", at, st.NextFull, st.NextQuick, st.LastFull.Err)
			}
		}
	}
	// One that ran out of time is retried, but not by the next backup.
	late := &outOfTime{Context: t.Context(), done: make(chan struct{})}
	_, err := Maintain(late, r, MaintainOptions{Mode: repository.MaintenanceFull, step: func(s string) {
		if s == "marked" {
			close(late.done)
		}
	}})
	if st := state(); err == nil || due() || st.NextFull.After(r.Now().Add(12*time.Hour)) || st.LastFull.Err == "" {
		t.Errorf("out of time (%v): %+v", err, st)
	}
	res, err := Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceFull, NoSafety: true})
	if err != nil || res.Mode != repository.MaintenanceFull {
		t.Fatalf("%+v, %v", res.MaintenanceReport, err)
	}
	st := state()
	if st.NextFull.Before(r.Now().Add(23*time.Hour)) || st.NextQuick.Before(r.Now().Add(30*time.Minute)) || st.LastFull.Err != "" || st.LastFull.End.IsZero() {
		t.Errorf("after a run that ended well: %+v", st)
	}
}

// MaybeMaintain writes nothing while one cycle is off and the other is not due.
func TestNothingIsDueOfACycleThatIsOff(t *testing.T) {
	t.Parallel()
	s := &lossSite{t: t, repo: repotest.New(t)}
	r := s.repo.Open(t)
	s.repo.TurnQuickOff(t, time.Now().Add(24*time.Hour))
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, err := r.MaintenanceState(t.Context())
	if err != nil || !st.Owned || !st.NextQuick.IsZero() || st.Due(r.Now()) != "" {
		t.Fatalf("%+v, %v", st, err)
	}
	before := s.files()
	MaybeMaintain(t.Context(), r)
	if after := s.files(); !maps.Equal(after, before) {
		t.Errorf("%d files, %d before", len(after), len(before))
	}
	if due := st.Due(st.NextFull); due != repository.MaintenanceFull {
		t.Errorf("a day later %q is due", due)
	}
}

package hold

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// inEach runs a test with each shell.
func inEach(t *testing.T, test func(t *testing.T, l *local)) {
	t.Helper()
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLocal(t, shell)
			if name == "busybox" {
				l.busyboxFirst()
			}
			test(t, l)
		})
	}
}

func TestHold(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		p := gated()
		p.Freeze = `printf '%s\n' "it's quoted" '\n'; ` + p.Freeze
		m := start(t.Context(), l, Target{}, p, calm, defaultBeat)
		if err := m.frozen(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := l.get("state"); got != "frozen" {
			t.Errorf("it says ready and is %s", got)
		}
		for range 3 {
			if err := m.prove(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.release(t.Context()); err != nil {
			t.Error(err)
		}
		if got := l.get("state"); got != "thawed" {
			t.Errorf("it was released and is %s", got)
		}
		if err := m.prove(t.Context()); !errors.Is(err, ErrLost) {
			t.Errorf("a proof after the end: %v", err)
		}
		if !strings.Contains(string(m.said), "it's quoted\n\\n") {
			t.Errorf("it printed %q", m.said)
		}
		l.gone()
	})
}

// Each end of a hold, with the reason that the client reports.
func TestHoldEnds(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		frozen := func(*member) bool { return true }
		m := l.inTime(2*time.Second, func(limit time.Duration) *member {
			p := gated()
			p.Limit = limit
			return start(t.Context(), l, Target{}, p, calm, defaultBeat)
		}, frozen)
		<-m.ended // by its own clock: the client is alive
		if err := m.prove(t.Context()); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "time limit") {
			t.Errorf("past its limit: %v", err)
		}
		if got := l.get("state"); got != "thawed" {
			t.Errorf("past its limit it is %s", got)
		}

		// The controller is alive but silent.
		m = l.inTime(2*time.Second, func(silence time.Duration) *member {
			return start(t.Context(), l, Target{}, gated(), silence, time.Hour)
		}, frozen)
		<-m.ended
		if err := m.why(); !strings.Contains(err.Error(), "nothing was heard") || l.get("state") != "thawed" {
			t.Errorf("in silence: %v, %s", err, l.get("state"))
		}

		// The controller is killed.
		ctx, cancel := context.WithCancel(t.Context())
		m = start(ctx, l, Target{}, gated(), calm, defaultBeat)
		if err := m.frozen(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		l.until("the thaw", func() bool { return l.get("state") == "thawed" })

		// Freezing takes too long, but ends.
		l.put("freeze-gate", "")
		p := gated()
		p.Limit = time.Second
		m = start(t.Context(), l, Target{}, p, calm, defaultBeat)
		if err := m.frozen(t.Context()); !errors.Is(err, ErrFreeze) || !strings.Contains(err.Error(), "time limit") {
			t.Errorf("a slow freeze: %v", err)
		}
		l.remove("freeze-gate")
		l.gone()
		if got := l.get("state"); got != "thawed" {
			t.Errorf("after a slow freeze it is %s", got)
		}

		// It fails after it has frozen a part.
		p = gated()
		p.Freeze += "; echo no such lock; exit 3"
		m = start(t.Context(), l, Target{}, p, calm, defaultBeat)
		err := m.frozen(t.Context())
		if !errors.Is(err, ErrFreeze) || !strings.Contains(err.Error(), "status 3") || !strings.Contains(err.Error(), "no such lock") {
			t.Errorf("a failing freeze: %v", err)
		}
		l.gone()
		if got := l.get("state"); got != "thawed" {
			t.Errorf("after a failed freeze it is %s", got)
		}

		// The check finds that it is not frozen.
		m = start(t.Context(), l, Target{}, gated(), calm, defaultBeat)
		if err := m.frozen(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.put("state", "frozen by another\n")
		if err := m.prove(t.Context()); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "check") {
			t.Errorf("a failing check: %v", err)
		}
		if err := m.release(t.Context()); err != nil || l.get("state") != "thawed" {
			t.Errorf("released after that: %v, %s", err, l.get("state"))
		}

		// It cannot be thawed at first.
		p = gated()
		p.Thaw = `[ -e "$DIR/once" ] || { echo >"$DIR/once"; exit 1; }; ` + p.Thaw
		m = start(t.Context(), l, Target{}, p, calm, defaultBeat)
		if err := errors.Join(m.frozen(t.Context()), m.prove(t.Context()), m.release(t.Context())); err != nil || l.get("state") != "thawed" {
			t.Errorf("a thaw that fails once: %v, %s", err, l.get("state"))
		}

		// Nor at all.
		p = gated()
		p.Thaw = "echo the lock is not mine; exit 1"
		m = start(t.Context(), l, Target{}, p, calm, defaultBeat)
		if err := errors.Join(m.frozen(t.Context()), m.prove(t.Context())); err != nil {
			t.Error(err)
		}
		if err := m.release(t.Context()); !errors.Is(err, ErrStuck) || !strings.Contains(err.Error(), "the lock is not mine") {
			t.Errorf("a thaw that fails: %v", err)
		}
		l.gone()
	})
}

// A program that arrives incomplete does nothing.
func TestHalfAProgram(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		text := gated().text("nonce", defaultSilence)
		for _, n := range []int{0, 1, len(text) / 3, len(text) - len(endOfProgram) - 2, len(text) - 2} {
			var out strings.Builder
			if err := l.Exec(t.Context(), Target{}, Bootstrap, strings.NewReader(text[:n]), &out); err == nil || strings.Contains(out.String(), "nonce") || l.get("state") != "" {
				t.Errorf("the first %d bytes of %d: %v, %q, %q", n, len(text), err, out.String(), l.get("state"))
			}
		}
	})
}

// Each process is killed at each step, with a client that continues and with one that falls
// silent, as if the kubelet were killed: nothing stays frozen, no process stays, and nothing
// counts as held that is not.
func TestKilledAtEachStep(t *testing.T) {
	t.Parallel()
	// At most six processes, and two that are about to become a sleep: a busy machine shows both as shells.
	const most = 9
	for name, shell := range shells(t) {
		if name == "bash" {
			continue
		}
		for _, step := range []string{"freezing", "frozen", "thawing"} {
			for _, silent := range []bool{false, true} {
				if silent && step == "thawing" {
					continue // it is told to thaw
				}
				t.Run(fmt.Sprintf("%s/%s/silent=%v", name, step, silent), func(t *testing.T) {
					t.Parallel()
					var killed atomic.Int32
					var wg sync.WaitGroup
					for i := range most { // they mostly sleep
						wg.Go(func() {
							l := newLocal(t, shell)
							if name == "busybox" {
								l.busyboxFirst()
							}
							if l.killOne(step, i, silent) {
								killed.Add(1)
							}
						})
					}
					wg.Wait()
					if n := killed.Load(); n < 4 || n == most {
						t.Errorf("%d processes were killed", n)
					}
				})
			}
		}
	}
}

// comeTo begins a program that waits at a step; for thawing it is yet to be released.
func (l *local) comeTo(ctx context.Context, step string) *member {
	l.t.Helper()
	// On a busy machine the client itself is silent for seconds. If it was for too long, the program is begun again.
	for silence := 10 * time.Second; ; silence *= 2 {
		if step != "frozen" {
			l.put(map[string]string{"freezing": "freeze-gate", "thawing": "thaw-gate"}[step], "")
		}
		m := start(ctx, l, Target{}, gated(), silence, 500*time.Millisecond)
		var err error
		if step == "freezing" {
			l.until(step, func() bool { return l.get("state") == step || m.endedWhy() != nil })
			err = m.endedWhy()
		} else {
			err = m.frozen(ctx)
		}
		if err == nil {
			return m
		}
		l.remove("freeze-gate")
		l.remove("thaw-gate")
		<-m.ended
		if m.thawing != "silence" || silence > calm {
			l.check(err)
		}
		l.remove("state")
	}
}

// killOne kills the ith process at a step; false if there is none.
func (l *local) killOne(step string, i int, silent bool) bool {
	t := l.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	defer cancel()
	m := l.comeTo(ctx, step)
	released := make(chan error, 1)
	if step == "thawing" {
		go func() { released <- m.release(ctx) }()
		l.until(step, func() bool { return l.get("state") == step })
	}
	// Short-lived ones are left out: sleep.
	var victims []process
	for _, p := range l.processes() {
		if !strings.Contains(p.command, "sleep") && !strings.Contains(p.command, "cat") {
			victims = append(victims, p)
		}
	}
	if i >= len(victims) {
		l.remove("freeze-gate")
		l.remove("thaw-gate")
		cancel()
		l.gone()
		return false
	}
	if silent {
		close(l.deaf)
	}
	_ = syscall.Kill(victims[i].pid, syscall.SIGKILL)
	said := fmt.Sprintf("%s, killed %v of %v", step, victims[i], victims)
	if !silent && step == "frozen" {
		// A proof is for a moment after the question: what thawed before is not proven.
		for began := time.Now(); time.Since(began) < 2*time.Second; time.Sleep(20 * time.Millisecond) {
			before := l.get("state")
			pctx, pcancel := context.WithTimeout(ctx, 3*time.Second)
			err := m.prove(pctx)
			pcancel()
			if err != nil {
				break
			}
			if before != "frozen" {
				t.Errorf("%s: it proves that it is frozen, and was %s before", said, before)
			}
		}
	}
	l.remove("freeze-gate")
	l.remove("thaw-gate")
	if !silent && step != "thawing" {
		_ = m.release(ctx)
	}
	if silent { // the processes end by themselves: no end of file, no controller
		l.gone()
	}
	if step == "thawing" {
		<-released
	}
	cancel()
	l.gone()
	if got := l.get("state"); got == "frozen" || got == "freezing" && step != "freezing" || got == "thawing" {
		t.Errorf("%s: it is left %s", said, got)
	}
	return true
}

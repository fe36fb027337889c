package hold

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// slow is a pod that thaws from a time on, and another, which never does.
type slow struct{ from time.Time }

func (s slow) Exec(_ context.Context, t Target, _ []string, stdin io.Reader, stdout io.Writer) error {
	lines := bufio.NewScanner(stdin)
	for lines.Scan() {
		if nonce, is := strings.CutPrefix(lines.Text(), "nonce='"); is && t.Pod == "a" && !time.Now().Before(s.from) {
			fmt.Fprintf(stdout, "%s thawed again\n", strings.TrimSuffix(nonce, "'"))
		}
		if lines.Text() == endOfProgram {
			break
		}
	}
	return errors.New("the container is not running")
}

// A target that was thawed again is free although another of its hold cannot be, and not before an exec
// that was begun last has ended.
func TestFreedAfterThaw(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		h := &Holds{Exec: slow{began.Add(5 * time.Minute)}, begins: began, busy: map[Target]time.Time{}}
		part := func(pod, container string) PartState {
			p := Program{Freeze: "true", Thaw: "true", Limit: 10 * time.Second}
			s := PartState{Part: Part{Program: p, Target: Target{Pod: pod, Container: container}}, left: &p}
			h.busy[s.Target] = time.Time{}
			return s
		}
		a, b, two := part("a", ""), part("b", ""), part("a", "two")
		thawed := two
		thawed.left, thawed.Thawed = nil, true
		h.free([]PartState{thawed, two, thawed}, began, false)
		go h.thawAgain([]PartState{a, b, two})
		is := func(at time.Duration, p PartState, busy bool) {
			t.Helper()
			time.Sleep(time.Until(began.Add(at)))
			synctest.Wait()
			if err := h.Busy([]Part{p.Part}); (err != nil) != busy {
				t.Errorf("after %v %+v: %v", at, p.Target, err)
			}
		}
		is(0, two, true)                           // a hook of the container has thawed, another has not
		is(5*time.Minute+25*time.Second, a, true)  // thawed just now
		is(5*time.Minute+55*time.Second, a, false) // 30 s later
		is(5*time.Minute+55*time.Second, b, true)  // is tried again
		is(10*time.Minute+25*time.Second, b, true) // tried no more
		is(10*time.Minute+55*time.Second, b, false)
	})
}

// A thaw that is run again ends with its client, and is tried once: it must not end a later hold.
func TestThawAgainIsBounded(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		run := func(ctx context.Context, p Program, silence time.Duration) *member {
			p.again = true
			return start(ctx, l, Target{}, p, silence, 500*time.Millisecond)
		}
		p := gated()
		p.Thaw = `echo x >>"$DIR/tries"; echo no; exit 1`
		m := run(t.Context(), p, calm)
		<-m.ended
		if tries := strings.Fields(l.get("tries")); len(tries) != 1 || !m.isStuck() || !strings.Contains(m.why().Error(), "no") {
			t.Errorf("it was tried %d times, %v", len(tries), m.why())
		}
		l.gone()
		// begun is a thaw that has begun.
		begun := func(ctx context.Context, silence time.Duration) *member {
			for ; ; silence *= 2 { // a busy machine may take longer to begin
				l.put("thaw-gate", "")
				l.put("state", "")
				m := run(ctx, gated(), silence)
				l.until("the thaw to begin", func() bool { return l.get("state") == "thawing" || m.endedWhy() != nil })
				if m.endedWhy() == nil {
					return m
				}
				if silence >= calm {
					t.Fatalf("it ends: %v", m.why())
				}
				l.gone()
			}
		}
		for _, how := range []string{"end", "silence"} { // after which l is deaf
			silence := calm
			if how == "silence" {
				silence = 5 * time.Second
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			m := begun(ctx, silence)
			switch how {
			case "end":
				cancel()
			case "silence":
				close(l.deaf)
			}
			l.gone()
			l.remove("thaw-gate")
			if state := l.get("state"); state != "thawing" || m.isThawed() {
				t.Errorf("%s: it is %s", how, state)
			}
			cancel()
			<-m.ended
		}
	})
}

package hold

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// newHolds is a process that holds, until the test ends.
func newHolds(t *testing.T, e Exec) *Holds {
	t.Helper()
	h := &Holds{Exec: e, Settle: time.Nanosecond, Silence: calm, Pause: 100 * time.Millisecond}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { _ = h.Start(ctx); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	for h.Busy(nil) != nil {
		time.Sleep(time.Millisecond) // until it was started
	}
	return h
}

// begin holds one application.
func (h *Holds) begin(t *testing.T, p Program) *Hold {
	t.Helper()
	held, err := h.Begin("run", types.NamespacedName{Namespace: "shop", Name: "run"}, []Part{{Hook: "app", Program: p, Target: Target{Pod: "a"}}}, func() {})
	if err != nil {
		t.Fatal(err)
	}
	return held
}

// killAll kills all processes of the test at once, as the end of their container does.
func (l *local) killAll() {
	l.t.Helper()
	for range 3 { // none is begun by a stopped one
		for _, p := range l.processes() {
			_ = syscall.Kill(p.pid, syscall.SIGSTOP)
		}
	}
	all := l.processes()
	if len(all) < 4 {
		l.t.Errorf("there are only %v", all)
	}
	for _, p := range all {
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
	}
}

// counted counts the execs of a pod, and can break them.
type counted struct {
	*local
	n atomic.Int32
}

func (c *counted) Exec(ctx context.Context, t Target, command []string, stdin io.Reader, stdout io.Writer) error {
	if c.n.Add(1) == 2 {
		return errors.New("the container is not running yet")
	}
	return c.local.Exec(ctx, t, command, stdin, stdout)
}

// If the container ends, with all processes of the program, another exec thaws.
func TestThawedAgain(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"freezing", "frozen", "failed"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			inEach(t, func(t *testing.T, l *local) {
				c := &counted{local: l}
				h := newHolds(t, c)
				p, want := gated(), "none"
				p.Thaw += `; echo "${freeze_failed-none}" >"$DIR/failed"`
				switch step {
				case "freezing":
					l.put("freeze-gate", "")
				case "failed":
					p.Freeze += "; exit 3"
					want = "3"
					l.put("thaw-gate", "")
				}
				held := h.begin(t, p)
				l.until(step, func() bool {
					state, _ := held.State()
					return step == "freezing" && l.get("state") == "freezing" || state == Held || l.get("state") == "thawing"
				})
				l.killAll()
				l.remove("thaw-gate")
				l.until("the thaw", func() bool { return l.get("failed") != "" })
				if state, failed := l.get("state"), l.get("failed"); state != "thawed" || failed != want || c.n.Load() != 3 {
					t.Errorf("it is %s by %d execs, freeze_failed was %s, want %s", state, c.n.Load(), failed, want)
				}
				<-held.done
				_, parts := held.State()
				if s := parts[0]; s.Proven || s.Thawed || !errors.Is(s.Err, ErrStuck) {
					t.Errorf("%+v", s)
				}
				if err := h.Busy([]Part{parts[0].Part}); !errors.Is(err, ErrBusy) {
					t.Errorf("another hold may begin: %v", err)
				}
				l.gone()
			})
		})
	}
}

// What has thawed, or said that it cannot, or has a session, is left alone; and so is a pod that took the
// place of the one that was held, and a container that runs on: its program has thawed.
func TestNotThawedAgain(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		stuck := gated()
		stuck.Thaw = "exit 1"
		session := Program{Session: "cat", Begin: "@nonce@ ready", Prove: "@nonce@ held %s", End: "bye", Limit: time.Minute}
		for name, p := range map[string]Program{"thawed": gated(), "stuck": stuck, "session": session} {
			h := newHolds(t, l)
			held := h.begin(t, p)
			l.until("the hold", func() bool { state, _ := held.State(); return state == Held })
			if name == "session" {
				l.killAll()
			}
			held.Cut()
			<-held.done
			if _, parts := held.State(); parts[0].left != nil {
				t.Errorf("%s: it is thawed again", name)
			}
			l.gone()
		}
		c := &counted{local: l}
		h := newHolds(t, c)
		pod := false
		h.Same = func(_ context.Context, _ Target, running string) (bool, bool, error) {
			return pod, running == "id", nil
		}
		p := gated()
		if err := h.thawOne(t.Context(), PartState{Part: Part{Program: p}, left: &p}); !errors.Is(err, errGone) || c.n.Load() != 0 {
			t.Errorf("in another pod: %v, %d execs", err, c.n.Load())
		}
		pod = true
		if err := h.thawOne(t.Context(), PartState{Part: Part{Program: p, Running: "id"}, left: &p}); !errors.Is(err, errLives) || c.n.Load() != 0 {
			t.Errorf("in the same container: %v, %d execs", err, c.n.Load())
		}
	})
}

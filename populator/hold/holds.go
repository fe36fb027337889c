package hold

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// proofPatience is how long a program may take to answer the challenge, its check included.
// It detects a stream that was cut silently.
const proofPatience = 15 * time.Second

// thawPatience is how long to wait for the thaw. The program continues to try without its client.
const thawPatience = time.Minute

// Part of a hold: one application in one container.
type Part struct {
	Hook, Recipe string
	Target       Target
	// Running is the ID of the target's container that runs; empty if it is not known.
	Running string
	Program Program
	// Continue allows the snapshot even if this application is not held. It is not called
	// consistent then.
	Continue bool
}

// State of a hold.
type State int

// States of a hold, in their order.
const (
	Freezing State = iota
	Held           // every required part is frozen
	Releasing
	Released // it has ended; a part that is not Thawed may still be thawed
)

// PartState is the state of a part.
type PartState struct {
	Part
	// FrozenAt is when it was frozen, and Held how long it was; zero if it was not.
	FrozenAt time.Time
	Held     time.Duration
	// Proven says that it was frozen after the cut.
	Proven bool
	// Thawed says that it is known to be no longer frozen.
	Thawed bool
	// Err is why it was not frozen or not proven, or the error at its end; nil if all was right.
	Err error
	// Notes are texts that belong to the snapshot, such as PostgreSQL's backup_label.
	Notes map[string]string

	left *Program // thaws what may be frozen; nil for nothing
}

// Hold holds applications from before the cut of their volumes' snapshots until after it.
type Hold struct {
	of    types.NamespacedName // the run's object
	mu    sync.Mutex
	state State
	parts []PartState
	cut   chan struct{}
	once  sync.Once
	end   context.CancelCauseFunc
	done  chan struct{}
}

// Holds are those of this process. They are safe for concurrent use. None of them outlives the process: a hold that
// another began is lost.
type Holds struct {
	Exec Exec
	// Same reports whether a target is still there: its pod may have been replaced by one of the
	// same name. container says that its container of that ID runs on. nil for a pod that is there, whose
	// container has ended.
	Same func(ctx context.Context, t Target, running string) (pod, container bool, err error)
	// Log receives what no run reports; nil for nothing.
	Log *slog.Logger
	// Silence, Beat and Pause, which is the time before each try to thaw again, are for tests; 0 for
	// the default.
	Silence, Beat, Pause time.Duration
	// Settle is how long after its start it begins no hold, so that the programs of a killed
	// process have thawed: their thaw would end a hold of this process unnoticed. 0 for the
	// default.
	Settle time.Duration

	mu      sync.Mutex
	all     map[types.UID]*Hold
	busy    map[Target]time.Time // until when; zero for held now
	begins  time.Time            // when the first hold may begin; zero before Start
	closed  bool
	ending  chan struct{} // closed when the process is to end; nil before Start
	running sync.WaitGroup
}

// errClosed ends the holds of a process that ends.
var errClosed = errors.New("the controller is being stopped")

// errDropped ends the hold of a run that has ended.
var errDropped = errors.New("the run has ended")

// defaultSettle is how long the programs of a killed process take to thaw.
const defaultSettle = defaultSilence + 5*time.Second

// ErrBusy means that another run holds, or may hold, one of the applications: two programs
// would thaw each other's.
var ErrBusy = errors.New("another run holds the application still")

// Busy returns nil if the applications can be held now.
func (h *Holds) Busy(parts []Part) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.isBusy(parts)
}

func (h *Holds) isBusy(parts []Part) error {
	now := time.Now()
	if h.begins.IsZero() || h.begins.After(now) {
		return fmt.Errorf("%w: an earlier process of the controller may have begun one, which ends within %v", ErrBusy, defaultSettle)
	}
	for _, p := range parts {
		if until, is := h.busy[p.Target]; is && (until.IsZero() || until.After(now)) {
			return fmt.Errorf("%w: pod %s", ErrBusy, p.Target.Pod)
		}
	}
	return nil
}

// Begin starts to hold applications for a run, whose object has the name; changed is called when the
// state may have changed. A run has one hold.
func (h *Holds) Begin(run types.UID, name types.NamespacedName, parts []Part, changed func()) (*Hold, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, errClosed
	}
	if h.all[run] != nil {
		return nil, fmt.Errorf("run %s has a hold already", run)
	}
	if err := h.isBusy(parts); err != nil {
		return nil, err
	}
	if h.busy == nil {
		h.busy = map[Target]time.Time{}
	}
	for _, p := range parts {
		h.busy[p.Target] = time.Time{}
	}
	ctx, end := context.WithCancelCause(context.Background())
	held := &Hold{of: name, cut: make(chan struct{}), end: end, done: make(chan struct{})}
	for _, p := range parts {
		held.parts = append(held.parts, PartState{Part: p})
	}
	if h.all == nil {
		h.all = map[types.UID]*Hold{}
	}
	h.all[run] = held
	h.running.Add(1)
	go func() {
		defer h.running.Done()
		held.run(ctx, h, changed)
		_, parts := held.State()
		left := slices.DeleteFunc(slices.Clone(parts), func(p PartState) bool { return p.left == nil })
		h.free(parts, time.Now(), false)
		end(nil)
		close(held.done)
		changed()
		if len(left) > 0 {
			h.thawAgain(left)
		}
	}()
	return held, nil
}

// free lets other runs hold the applications of a hold that has ended. An application that may still
// be frozen stays busy for as long as a program in the pod, or this process, may thaw it. last says that this
// process does no more. Parts may have one target: then all are given.
func (h *Holds) free(parts []PartState, ended time.Time, last bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range parts {
		has := func(is func(q PartState) bool) bool {
			return slices.ContainsFunc(parts, func(q PartState) bool { return q.Target == p.Target && is(q) })
		}
		until := ended.Add(p.Program.Limit + defaultSettle)
		switch {
		case !last && has(func(q PartState) bool { return q.left != nil }): // thawAgain frees it
		case !has(func(q PartState) bool { return !q.Thawed }):
			delete(h.busy, p.Target)
		case until.After(h.busy[p.Target]):
			h.busy[p.Target] = until
		}
	}
}

// Get returns the hold of a run; nil if this process has none.
func (h *Holds) Get(run types.UID) *Hold {
	if h == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.all[run]
}

// Drop ends the hold of a run at once, if it has one. It does not wait.
func (h *Holds) Drop(run types.UID) {
	h.drop(func(uid types.UID, _ *Hold) bool { return uid == run })
}

// Gone is Drop for the runs of a name, except the one that has the name now, if any: an object may be
// deleted just before Begin.
func (h *Holds) Gone(name types.NamespacedName, now types.UID) {
	h.drop(func(uid types.UID, held *Hold) bool { return held.of == name && uid != now })
}

func (h *Holds) drop(is func(run types.UID, held *Hold) bool) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for run, held := range h.all {
		if is(run, held) {
			held.end(errDropped)
			delete(h.all, run)
		}
	}
}

// Start implements controller-runtime's manager.Runnable: it returns once the process is to end
// and every hold has been released.
func (h *Holds) Start(ctx context.Context) error {
	settle := h.Settle
	if settle == 0 {
		settle = defaultSettle
	}
	h.mu.Lock()
	h.begins = time.Now().Add(settle)
	h.ending = make(chan struct{})
	h.mu.Unlock()
	<-ctx.Done()
	h.mu.Lock()
	h.closed = true
	close(h.ending)
	for _, held := range h.all {
		held.end(errClosed)
	}
	h.mu.Unlock()
	h.running.Wait()
	return nil
}

func (h *Holds) silence() time.Duration { return cmp.Or(h.Silence, defaultSilence) }
func (h *Holds) beat() time.Duration    { return cmp.Or(h.Beat, defaultBeat) }

// State returns the state of the hold and of its parts.
func (h *Hold) State() (State, []PartState) {
	h.mu.Lock()
	defer h.mu.Unlock()
	parts := make([]PartState, len(h.parts))
	for i, p := range h.parts {
		p.Notes = maps.Clone(p.Notes)
		parts[i] = p
	}
	return h.state, parts
}

// Cut reports that the snapshots are taken: the hold is now proven, and released.
func (h *Hold) Cut() { h.once.Do(func() { close(h.cut) }) }

func (h *Hold) set(s State) {
	h.mu.Lock()
	h.state = s
	h.mu.Unlock()
}

func (h *Hold) part(i int, change func(p *PartState)) {
	h.mu.Lock()
	change(&h.parts[i])
	h.mu.Unlock()
}

// run freezes, waits for the cut, proves and releases.
func (h *Hold) run(ctx context.Context, holds *Holds, changed func()) {
	// The streams end last, and with them the rest of the programs.
	streams, closeAll := context.WithCancel(context.Background())
	members := make([]*member, len(h.parts))
	defer func() {
		closeAll()
		for _, m := range members {
			<-m.ended
		}
		h.set(Released)
	}()
	for i := range members {
		members[i] = start(streams, holds.Exec, h.parts[i].Target, h.parts[i].Program, holds.silence(), holds.beat())
	}
	if h.freeze(ctx, members) {
		h.set(Held)
		changed()
		h.await(ctx, members)
	}
	h.set(Releasing)
	changed()
	proven := context.Cause(ctx)
	select {
	case <-h.cut:
	default:
		if proven == nil {
			proven = errors.New("the snapshot was not taken")
		}
	}
	each(members, func(i int, m *member) { h.letGo(i, m, proven) })
}

// each calls do for all concurrently and waits for them.
func each(members []*member, do func(i int, m *member)) {
	var wg sync.WaitGroup
	for i, m := range members {
		wg.Go(func() { do(i, m) })
	}
	wg.Wait()
}

// freeze waits until all required ones are frozen. The first failure of one of these ends the
// wait for all.
func (h *Hold) freeze(ctx context.Context, members []*member) bool {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	ok := true
	var mu sync.Mutex
	each(members, func(i int, m *member) {
		p := h.parts[i].Part
		limit, cancel := context.WithTimeoutCause(ctx, p.Program.Limit, fmt.Errorf("it did not end within %v", p.Program.Limit))
		defer cancel()
		err := m.frozen(limit)
		h.part(i, func(s *PartState) {
			if s.Err = err; err == nil {
				s.FrozenAt = time.Now()
			}
		})
		if err != nil && !p.Continue {
			mu.Lock()
			ok = false
			mu.Unlock()
			stop(fmt.Errorf("hook %s in pod %s failed", p.Hook, p.Target.Pod))
		}
	})
	return ok
}

// await waits for the cut, or until the hold is useless.
func (h *Hold) await(ctx context.Context, members []*member) {
	lost := make(chan struct{}, len(members))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i, m := range members {
		if h.parts[i].Err != nil || h.parts[i].Continue { // written before, by this goroutine's children
			continue
		}
		wg.Go(func() {
			select {
			case <-m.ended:
				lost <- struct{}{}
			case <-stop:
			}
		})
	}
	select {
	case <-h.cut:
	case <-ctx.Done():
	case <-lost:
	}
	close(stop)
	wg.Wait()
}

// letGo proves that an application is still held, unless that is known to be useless, and thaws
// it.
func (h *Hold) letGo(i int, m *member, useless error) {
	h.mu.Lock()
	frozenAt, failed := h.parts[i].FrozenAt, h.parts[i].Err
	h.mu.Unlock()
	var proof error
	if failed == nil && frozenAt.IsZero() {
		failed = ErrFreeze
	}
	if failed == nil {
		if proof = useless; proof == nil {
			ctx, cancel := context.WithTimeoutCause(context.Background(), proofPatience, fmt.Errorf("no answer came within %v", proofPatience))
			proof = m.prove(ctx)
			cancel()
		} else if ended := m.endedWhy(); ended != nil {
			proof = fmt.Errorf("%w: %w", ErrLost, ended)
		}
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), thawPatience, fmt.Errorf("no answer came within %v", thawPatience))
	end := m.release(ctx)
	cancel()
	// One that did not begin to freeze and has ended silently had nothing to thaw. One that has neither thawed
	// nor ended may be frozen, and so may one that had begun.
	if failed != nil && end != nil && !m.isStuck() && m.left(h.parts[i].Program) == nil && (m.isThawed() || m.endedWhy() != nil) {
		end = nil
	}
	h.part(i, func(s *PartState) {
		if failed == nil {
			s.Held = time.Since(frozenAt)
			s.Proven = proof == nil && (end == nil || errors.Is(end, ErrStuck))
		}
		s.Thawed, s.left = m.isThawed(), m.left(s.Program)
		s.Err = errors.Join(failed, proof, end)
		s.Notes = m.noted()
	})
}

// Package step runs a job of the controller as a named list of steps that survives
// the death of the process between, and in the midst of, any two of them.
//
// A job (a backup, a populate, the swap of a PersistentVolume) is a List. The name of
// the step being worked on is written to the job's object before the step begins, and
// a new process goes on from there. Each step is idempotent: it looks at the cluster,
// brings about what its name says if that is not so yet, and says Done, or Wait with
// what it waits for. What a later step needs to know is in the object before the step
// that makes it necessary: a handle is never in memory alone.
//
// Because steps have names and their writes go through Observe, a test can stop the
// process before and after each write of a list without knowing what the steps do.
package step

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Step of a job. R is what the job works on; it may be changed by the step.
type Step[R any] struct {
	// Name is stable: it is recorded in objects, and documented for users.
	Name string
	// Do brings about what the name says. It is called again until it says Done;
	// an error is tried again with back-off unless it is Terminal.
	Do func(ctx context.Context, r R) (Result, error)
}

// Result of a step that did not fail.
type Result struct {
	done    bool
	Reason  string        // what is waited for, a condition reason
	Message string        // the same for people
	After   time.Duration // look again then, besides when a watched object changes; 0 for then only
}

// Done says that what the step is for has come about.
func Done() Result { return Result{done: true} }

// Wait says that somebody else has to do something first. after is how long until
// the step looks again even if no watched object changed; 0 leaves it to watches.
func Wait(reason, message string, after time.Duration) Result {
	return Result{Reason: reason, Message: message, After: after}
}

// IsDone tells Done from Wait.
func (r Result) IsDone() bool { return r.done }

// terminal is an error that trying again cannot help.
type terminal struct {
	reason string
	err    error
}

func (t *terminal) Error() string { return t.err.Error() }
func (t *terminal) Unwrap() error { return t.err }

// Terminal marks an error that ends the job; reason is a condition reason.
func Terminal(reason string, err error) error { return &terminal{reason: reason, err: err} }

// IsTerminal returns the reason of a Terminal error.
func IsTerminal(err error) (reason string, ok bool) {
	var t *terminal
	if !errors.As(err, &t) {
		return "", false
	}

	return t.reason, true
}

// List is a job's steps in order.
type List[R any] struct {
	Name  string // of the job: backup, populate, swap
	Steps []Step[R]
}

// Names of the steps in order.
func (l List[R]) Names() []string {
	names := make([]string, 0, len(l.Steps))
	for _, s := range l.Steps {
		names = append(names, s.Name)
	}

	return names
}

// Run goes on with a job from the step at, or from the first if at is empty. record
// writes the name of a step to the job's object and is called before each step that
// was not recorded yet, the first too; it must not return nil before the API server
// has the name. When the last step is done the result is Done, and nothing is
// recorded: what a finished job looks like is for its caller to write.
//
// An unknown name is an error that loses nothing: a newer version wrote it.
func (l List[R]) Run(ctx context.Context, r R, at string, record func(ctx context.Context, step string) error) (Result, error) {
	i := 0
	if at != "" {
		i = slices.IndexFunc(l.Steps, func(s Step[R]) bool { return s.Name == at })
		if i < 0 {
			return Result{}, fmt.Errorf("%s: step %q is not known to this version of Varve, which leaves the job alone; run the version that began it", l.Name, at)
		}
	}

	for ; i < len(l.Steps); i++ {
		s := l.Steps[i]
		sctx := withName(ctx, l.Name+"/"+s.Name)
		if s.Name != at {
			if err := record(sctx, s.Name); err != nil {
				return Result{}, fmt.Errorf("%s: record step %s: %w", l.Name, s.Name, err)
			}
		}
		res, err := s.Do(sctx, r)
		if err != nil {
			return Result{}, fmt.Errorf("%s: %s: %w", l.Name, s.Name, err)
		}
		if !res.done {
			return res, nil
		}
	}

	return Done(), nil
}

type nameKey struct{}

func withName(ctx context.Context, name string) context.Context {
	return context.WithValue(ctx, nameKey{}, name)
}

// Current returns the name of the step that a context belongs to, as list/step; empty
// outside of a list.
func Current(ctx context.Context) string {
	name, _ := ctx.Value(nameKey{}).(string)

	return name
}

// Package step runs a job of the controller as a named list of steps that survives the
// death of the process between and within steps.
//
// A job (a backup, a populate, the swap of a PersistentVolume) is a List. The name of
// the step being worked on is written to the job's object before the step begins, and a
// new process continues from there. Each step is idempotent: it reads the cluster, brings
// about what its name says if necessary, and returns Done, or Wait with what it waits
// for. What a later step needs to know is recorded in the object before the step that
// makes it necessary: a handle is never only in memory.
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

// Step of a job. R is what the job works on; the step may change it.
type Step[R any] struct {
	// Name is stable: it is recorded in objects, and documented for users.
	Name string
	// Do brings about what the name says. It is called until it returns Done; an error is
	// retried with back-off unless it is Terminal.
	Do func(ctx context.Context, r R) (Result, error)
}

// Result of a step that did not fail.
type Result struct {
	done    bool
	Reason  string        // what is waited for, a condition reason
	Message string        // the same for people
	After   time.Duration // check again then, and when a watched object changes; 0 for the latter only
}

// Done says that the step has achieved its purpose.
func Done() Result { return Result{done: true} }

// Wait says that another process or user must do something first. after is how long until
// the step checks again even if no watched object changed; 0 leaves it to watches.
func Wait(reason, message string, after time.Duration) Result {
	return Result{Reason: reason, Message: message, After: after}
}

// IsDone reports whether it is Done.
func (r Result) IsDone() bool { return r.done }

// terminal is an error that a retry cannot fix.
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

// Cause returns a Terminal error without the names of list and step that Run put before it; it
// returns any other error unchanged.
func Cause(err error) error {
	for {
		if _, ok := IsTerminal(err); !ok {
			return err
		}
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		if _, ok := IsTerminal(next); !ok {
			return next
		}
		err = next
	}
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

// Run continues a job from the step at, or from the first if at is empty. record writes
// the name of a step to the job's object and is called before each step that was not
// recorded yet, including the first; it must not return nil before the API server has the
// name. After the last step the result is Done and nothing is recorded: the caller writes
// the state of a finished job.
//
// An unknown name, written by a newer version, is an error that loses nothing.
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

package hold

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// The end of a container ends all processes of a program at once. What does not end with a session, such as
// a frozen file system, is then thawed by another exec. If only the stream was cut, the program itself thaws:
// another thaw would be late, and end what another hold has frozen through another container.

// thawAgainFor is how long that is tried: the kubelet waits for up to five minutes before it restarts a
// container that fails often.
const thawAgainFor = 10 * time.Minute

// Why another exec does not thaw.
var (
	errGone  = errors.New("the pod is gone")             // there is no container any more in which to thaw
	errLives = errors.New("the program thaws by itself") // its container has not ended
)

// thawAgain thaws parts whose programs did not say that they had, and frees each target. It ends before
// this process does.
func (h *Holds) thawAgain(parts []PartState) {
	ctx, stop := context.WithTimeoutCause(context.Background(), thawAgainFor, fmt.Errorf("it was tried for %v", thawAgainFor))
	defer stop()
	go func() {
		select {
		case <-h.ending:
			stop()
		case <-ctx.Done():
		}
	}()
	log := h.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	targets := map[Target][]PartState{}
	for _, p := range parts {
		targets[p.Target] = append(targets[p.Target], p)
	}
	var all sync.WaitGroup
	for _, parts := range targets {
		all.Go(func() {
			var wg sync.WaitGroup
			for _, p := range parts {
				wg.Go(func() {
					with := log.With("pod", p.Target.String(), "hook", p.Hook)
					switch err := h.thawOne(ctx, p); {
					case errors.Is(err, errLives):
						with.InfoContext(ctx, "the stream of a hold was cut; its program in the pod thaws by itself")
					case err != nil:
						with.WarnContext(ctx, "an application may still be frozen", "error", err)
					default:
						with.InfoContext(ctx, "an application was thawed after the end of its hold")
					}
				})
			}
			wg.Wait()
			h.free(parts, time.Now(), true)
		})
	}
	all.Wait()
}

// thawOne tries until the thaw command succeeds, or cannot.
func (h *Holds) thawOne(ctx context.Context, p PartState) error {
	var last error
	for {
		// A program that lives thaws by itself before the first try.
		timer := time.NewTimer(cmp.Or(h.Pause, defaultSettle))
		select {
		case <-ctx.Done():
			timer.Stop()
			return errors.Join(context.Cause(ctx), last)
		case <-timer.C:
		}
		if h.Same != nil {
			pod, container, err := h.Same(ctx, p.Target, p.Running)
			switch {
			case err != nil:
				last = err
				continue
			case !pod:
				return errGone
			case container:
				return errLives
			}
		}
		if last = h.tryThaw(ctx, p); last == nil || errors.Is(last, ErrForbidden) {
			return last
		}
	}
}

// tryThaw runs the thaw command once.
func (h *Holds) tryThaw(ctx context.Context, p PartState) error {
	ctx, stop := context.WithTimeoutCause(ctx, thawPatience, fmt.Errorf("no answer came within %v", thawPatience))
	m := start(ctx, h.Exec, p.Target, *p.left, h.silence(), h.beat())
	err := m.wait(ctx, func() bool { return m.thawed || m.stuck })
	stop()
	<-m.ended
	if m.isThawed() {
		return nil
	}
	if err == nil {
		err = m.why()
	}
	return fmt.Errorf("%w: %w", ErrStuck, err)
}

package repository

import (
	"context"
	"errors"
	"sync"
	"time"
)

// A storage is given up for its silence, not for the duration of the work: with empty
// caches and a slow link the indexes of a large repository take minutes. Silence is time
// during a request in which nothing arrives: no byte, no blob name, no answer. Time that
// this process spends itself, to derive a key or to wait for its turn, does not count.

// errNoAnswer cancels an attempt because the storage was silent for too long.
var errNoAnswer = errors.New("no answer in time")

// silence watches a storage's answers to the calls made with its context.
type silence struct {
	limit  time.Duration
	cancel context.CancelCauseFunc
	outer  *silence // of the parent context; hears the same

	mu    sync.Mutex
	asked int           // calls under way
	since time.Time     // when the silence began, or continued, while asked > 0
	spent time.Duration // of the silence before since: no call waits in between
	timer *time.Timer
	over  bool
}

type silenceKey struct{}

func silenceOf(ctx context.Context) *silence {
	s, _ := ctx.Value(silenceKey{}).(*silence)
	return s
}

// boundSilence returns a context that is cancelled, with errNoAnswer, once the storage
// was silent for limit. Call settled once the work is done: a storage may keep the
// context, so it lives until release.
func boundSilence(parent context.Context, limit time.Duration) (ctx context.Context, settled, release func()) {
	ctx, cancel := context.WithCancelCause(parent)
	s := &silence{limit: limit, cancel: cancel, outer: silenceOf(parent)}
	return context.WithValue(ctx, silenceKey{}, s), s.settle, func() { s.settle(); cancel(context.Canceled) }
}

// begin notes that a call began.
func (s *silence) begin() {
	for ; s != nil; s = s.outer {
		s.mu.Lock()
		if s.asked++; s.asked == 1 && !s.over {
			s.since = time.Now()
			if s.timer == nil {
				s.timer = time.AfterFunc(s.limit-s.spent, s.rang)
			} else {
				s.timer.Reset(s.limit - s.spent)
			}
		}
		s.mu.Unlock()
	}
}

// heard notes that something arrived.
func (s *silence) heard() {
	for ; s != nil; s = s.outer {
		s.mu.Lock()
		s.since, s.spent = time.Now(), 0
		s.mu.Unlock()
	}
}

// end notes that a call ended. A failed call is no answer: it may be retried without end.
func (s *silence) end(answered bool) {
	if answered {
		s.heard()
	}
	for ; s != nil; s = s.outer {
		s.mu.Lock()
		if s.asked--; s.asked == 0 && s.timer != nil {
			s.timer.Stop()
			s.spent += time.Since(s.since)
		}
		s.mu.Unlock()
	}
}

// rang is called when the silence may have lasted too long.
func (s *silence) rang() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.asked == 0 {
		return
	}
	if left := s.limit - s.spent - time.Since(s.since); left > 0 {
		s.timer.Reset(left)
		return
	}
	s.over = true
	s.cancel(errNoAnswer)
}

func (s *silence) settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	if s.timer != nil {
		s.timer.Stop()
	}
}

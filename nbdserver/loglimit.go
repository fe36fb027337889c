package nbdserver

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// logBurst is how many lines of one message are written at once.
	logBurst = 20
	// logEvery is the time after which one more is.
	logEvery = time.Minute
)

// LimitLog returns a handler for messages that untrusted clients cause: of each message, 20
// are written and then one a minute, with the number skipped. Debug messages pass.
func LimitLog(h slog.Handler) slog.Handler {
	return &limitedLog{next: h, counts: &logCounts{now: time.Now, of: map[string]*logCount{}}}
}

type limitedLog struct {
	next   slog.Handler
	counts *logCounts // shared by all handlers made of this one
}

type logCounts struct {
	now func() time.Time

	mu sync.Mutex
	of map[string]*logCount // by message
}

type logCount struct {
	lines   int       // may be written now
	since   time.Time // of the last line that was added to these
	dropped int
}

// pass reports whether a message may be written, and how many were skipped before it.
func (c *logCounts) pass(message string) (dropped int, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	m := c.of[message]
	if m == nil {
		m = &logCount{lines: logBurst, since: now}
		c.of[message] = m
	}
	if earned := int(now.Sub(m.since) / logEvery); earned > 0 {
		m.lines = min(m.lines+earned, logBurst)
		m.since = m.since.Add(time.Duration(earned) * logEvery)
	}
	if m.lines == 0 {
		m.dropped++
		return 0, false
	}
	m.lines--
	dropped, m.dropped = m.dropped, 0
	return dropped, true
}

// Enabled is the inner handler's.
func (l *limitedLog) Enabled(ctx context.Context, level slog.Level) bool {
	return l.next.Enabled(ctx, level)
}

// Handle writes a message, or counts it.
func (l *limitedLog) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelInfo {
		dropped, ok := l.counts.pass(r.Message)
		if !ok {
			return nil
		}
		if dropped > 0 {
			r = r.Clone()
			r.AddAttrs(slog.Int("left_out_before", dropped))
		}
	}
	return l.next.Handle(ctx, r)
}

// WithAttrs and WithGroup are the inner handler's; the counts stay.
func (l *limitedLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &limitedLog{next: l.next.WithAttrs(attrs), counts: l.counts}
}

// WithGroup begins a group.
func (l *limitedLog) WithGroup(name string) slog.Handler {
	return &limitedLog{next: l.next.WithGroup(name), counts: l.counts}
}

package progress

import (
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/varve-io/varve/internal/bytesize"
)

// Unit is what a task counts.
type Unit int

// The units a task may count.
const (
	Count Unit = iota
	Bytes
)

func (u Unit) format(n int64) string {
	if u == Bytes {
		return bytesize.Format(n)
	}
	return fmt.Sprint(n)
}

// rate is a moving average of units per second: short enough to follow a
// change, long enough not to jump.
type rate struct {
	at    time.Time
	done  int64
	value float64
	valid bool
}

const rateWindow = 15 * time.Second

func (r *rate) reset(now time.Time) { *r = rate{at: now} }

func (r *rate) update(now time.Time, done int64) {
	dt := now.Sub(r.at).Seconds()
	if dt <= 0 {
		return
	}
	v := float64(done-r.done) / dt
	if r.valid {
		w := dt / rateWindow.Seconds()
		if w > 1 {
			w = 1
		}
		v = r.value + (v-r.value)*w
	}
	*r = rate{at: now, done: done, value: max(v, 0), valid: true}
}

// snapshot is a task at one moment.
type snapshot struct {
	name, phase string
	unit        Unit
	done, total int64
	rate        float64 // units per second; 0 when not known
	elapsed     time.Duration
}

func (t *Task) snapshot(now time.Time) snapshot {
	s := snapshot{name: t.name, unit: t.unit, done: t.done.Load(), total: t.total.Load(), elapsed: now.Sub(t.started)}
	if p := t.phase.Load(); p != nil {
		s.phase = *p
	}
	t.rate.update(now, s.done)
	s.rate = t.rate.value
	return s
}

// eta is the time left at the present rate, or -1 if unknown.
func (s snapshot) eta() time.Duration {
	if s.total <= 0 || s.rate <= 0 || s.done > s.total {
		return -1
	}
	sec := float64(s.total-s.done) / s.rate
	if sec > 365*24*3600 {
		return -1
	}
	return time.Duration(sec * float64(time.Second)).Round(time.Second)
}

func (s snapshot) attrs() []slog.Attr {
	a := []slog.Attr{slog.Int64("done", s.done)}
	if s.total > 0 {
		a = append(a, slog.Int64("total", s.total))
	}
	if s.phase != "" {
		a = append(a, slog.String("phase", s.phase))
	}
	a = append(a, slog.Int64("per_second", int64(s.rate)))
	if eta := s.eta(); eta >= 0 {
		a = append(a, slog.Duration("eta", eta))
	}
	return a
}

// bar draws the task into at most width columns.
func (s snapshot) bar(width int) string {
	left := s.name
	if s.phase != "" {
		left += " " + s.phase
	}
	var right string
	if s.total > 0 {
		right = fmt.Sprintf("%3d%%  %s / %s", percent(s.done, s.total), s.unit.format(s.done), s.unit.format(s.total))
	} else {
		right = s.unit.format(s.done)
	}
	if s.rate > 0 {
		right += fmt.Sprintf("  %s/s", s.unit.format(int64(s.rate)))
	}
	if eta := s.eta(); eta >= 0 {
		right += "  ETA " + eta.String()
	}
	room := width - utf8.RuneCountInString(left) - utf8.RuneCountInString(right) - 6
	line := left + "  " + right
	if s.total > 0 && room >= 8 {
		cells := min(room, 40)
		full := int(int64(cells) * int64(percent(s.done, s.total)) / 100)
		line = left + "  [" + strings.Repeat("=", full) + strings.Repeat(" ", cells-full) + "] " + right
	}
	return cut(line, width)
}

func percent(done, total int64) int {
	if done <= 0 || total <= 0 {
		return 0
	}
	return int(min(float64(done)/float64(total), 1) * 100)
}

func cut(s string, width int) string {
	if r := []rune(s); len(r) > width && width >= 0 {
		return string(r[:width])
	}
	return s
}

// Package progress shows the progress of long work: a bar with rate and ETA on a terminal,
// occasional log lines elsewhere.
//
// One Display serves one output stream. Tasks are counted from any goroutine; a single
// goroutine of the Display draws, and Display.Close waits for it. All other output to the
// same terminal goes through Display.Writer, which removes the bars and draws them again.
package progress

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Options say how a Display shows its tasks. With neither Terminal nor Log set nothing is
// shown.
type Options struct {
	Terminal io.Writer        // where bars are drawn; nil for none
	Width    func() int       // columns of the terminal; nil for 80
	Log      *slog.Logger     // where lines go when Terminal is nil
	Every    time.Duration    // between draws; 0 for 200 ms of bars or 10 s of log lines
	Now      func() time.Time // nil for time.Now
}

// Display draws the tasks started on it.
type Display struct {
	opt  Options
	stop chan struct{}
	done chan struct{}

	mu    sync.Mutex // guards all below, and writes to the terminal
	tasks []*Task
	drawn int // lines of bars on the terminal now
}

// New returns a Display. Close it.
func New(opt Options) *Display {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Every == 0 {
		opt.Every = 10 * time.Second
		if opt.Terminal != nil {
			opt.Every = 200 * time.Millisecond
		}
	}
	d := &Display{opt: opt, stop: make(chan struct{}), done: make(chan struct{})}
	if opt.Terminal == nil && opt.Log == nil {
		close(d.done)
		return d
	}
	go d.run()
	return d
}

func (d *Display) run() {
	defer close(d.done)
	tick := time.NewTicker(d.opt.Every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			d.Draw()
		case <-d.stop:
			return
		}
	}
}

// Close removes the bars and waits for the drawing goroutine. Tasks may still be counted
// after it; they are not shown.
func (d *Display) Close() {
	d.mu.Lock()
	select {
	case <-d.stop:
	default:
		close(d.stop)
	}
	d.erase()
	d.tasks = nil
	d.mu.Unlock()
	<-d.done
}

// Start adds a task of total units of work; 0 when the total is not known.
func (d *Display) Start(name string, total int64, unit Unit) *Task {
	t := &Task{d: d, name: name, unit: unit, started: d.opt.Now()}
	t.total.Store(total)
	t.rate.reset(t.started)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tasks = append(d.tasks, t)
	return t
}

// Draw shows the tasks now, as the Display itself does from time to time.
func (d *Display) Draw() {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.stop:
		return
	default:
	}
	now := d.opt.Now()
	if d.opt.Terminal != nil {
		d.erase()
		d.drawBars(now)
		return
	}
	if d.opt.Log == nil {
		return
	}
	for _, t := range d.tasks {
		s := t.snapshot(now)
		d.opt.Log.LogAttrs(context.Background(), slog.LevelInfo, t.name, s.attrs()...)
	}
}

// erase removes the bars that are on the terminal.
func (d *Display) erase() {
	if d.opt.Terminal == nil || d.drawn == 0 {
		return
	}
	// To column 0, up to the first bar, and clear to the end of the screen.
	up := ""
	if d.drawn > 1 {
		up = fmt.Sprintf("\x1b[%dA", d.drawn-1)
	}
	_, _ = io.WriteString(d.opt.Terminal, "\r"+up+"\x1b[J")
	d.drawn = 0
}

func (d *Display) drawBars(now time.Time) {
	width := 80
	if d.opt.Width != nil {
		width = d.opt.Width()
	}
	lines := make([]string, 0, len(d.tasks))
	for _, t := range d.tasks {
		lines = append(lines, t.snapshot(now).bar(width-1)) // the last column would wrap
	}
	_, _ = io.WriteString(d.opt.Terminal, strings.Join(lines, "\n"))
	d.drawn = len(lines)
}

// Writer returns a writer to the terminal that keeps what is written apart
// from the bars. Write whole lines.
func (d *Display) Writer(w io.Writer) io.Writer { return &lineWriter{d: d, w: w} }

type lineWriter struct {
	d *Display
	w io.Writer
}

func (l *lineWriter) Write(p []byte) (int, error) {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	l.d.erase() // the next draw puts them back
	return l.w.Write(p)
}

// Task is a piece of work. Its methods may be called from any goroutine.
type Task struct {
	d       *Display
	name    string
	unit    Unit
	started time.Time

	done, total atomic.Int64
	phase       atomic.Pointer[string]

	rate rate // guarded by Display.mu
}

// Add counts n more units done.
func (t *Task) Add(n int64) { t.done.Add(n) }

// Set sets the number of units done.
func (t *Task) Set(n int64) { t.done.Store(n) }

// SetTotal sets the total number of units.
func (t *Task) SetTotal(n int64) { t.total.Store(n) }

// SetPhase describes in a word or two what the task does now.
func (t *Task) SetPhase(s string) { t.phase.Store(&s) }

// Done ends the task and removes it from the display.
func (t *Task) Done() {
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	for i, o := range t.d.tasks {
		if o == t {
			t.d.erase()
			t.d.tasks = append(t.d.tasks[:i], t.d.tasks[i+1:]...)
			return
		}
	}
}

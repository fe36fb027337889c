package progress

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestRateAndETA(t *testing.T) {
	now := time.Unix(1000, 0)
	d := New(Options{Now: func() time.Time { return now }})
	defer d.Close()
	task := d.Start("backup", 1000, Count)
	for range 10 {
		now = now.Add(time.Second)
		task.Add(10)
		task.snapshot(now)
	}
	s := task.snapshot(now)
	if s.rate != 10 || s.eta() != 90*time.Second {
		t.Errorf("rate %v, ETA %v", s.rate, s.eta())
	}
	task.Set(2000) // more than the total: the rest is unknown
	if s := task.snapshot(now.Add(time.Second)); s.eta() != -1 {
		t.Errorf("ETA %v", s.eta())
	}
}

func TestBarFitsTheTerminal(t *testing.T) {
	now := time.Unix(1000, 0)
	d := New(Options{Now: func() time.Time { return now }})
	defer d.Close()
	task := d.Start("backup shop/dätabase", 1<<40, Bytes)
	task.SetPhase("hashing")
	task.Set(1 << 39)
	now = now.Add(time.Minute)
	for _, width := range []int{0, 1, 20, 79, 119, 300} {
		if n := utf8.RuneCountInString(task.snapshot(now).bar(width)); n > width {
			t.Errorf("%d columns in a width of %d", n, width)
		}
	}
	if bar := task.snapshot(now).bar(119); !strings.Contains(bar, " 50%") || !strings.Contains(bar, "====") || !strings.Contains(bar, "ETA") {
		t.Errorf("bar %q", bar)
	}
}

func TestTerminalKeepsWhatIsWritten(t *testing.T) {
	var out bytes.Buffer
	d := New(Options{Terminal: &out, Every: time.Hour})
	d.Start("one", 10, Count)
	task := d.Start("two", 10, Count)
	d.Draw()
	if _, err := d.Writer(&out).Write([]byte("a log line\n")); err != nil {
		t.Fatal(err)
	}
	d.Draw()
	task.Done()
	d.Close()
	d.Close() // twice is harmless
	got := out.String()
	if !strings.Contains(got, "\r\x1b[1A\x1b[Ja log line\n") { // two bars up, then the line
		t.Errorf("output %q", got)
	}
	if !strings.HasSuffix(got, "\x1b[J") {
		t.Errorf("bars are left: %q", got)
	}
}

func TestLogLines(t *testing.T) {
	var out bytes.Buffer
	d := New(Options{Log: slog.New(slog.NewTextHandler(&out, nil)), Every: time.Hour})
	task := d.Start("verify", 100, Count)
	task.Add(25)
	d.Draw()
	d.Close()
	d.Draw() // nothing after Close
	if n := strings.Count(out.String(), "\n"); n != 1 || !strings.Contains(out.String(), "msg=verify done=25 total=100") {
		t.Errorf("%d lines: %s", n, out.String())
	}
}

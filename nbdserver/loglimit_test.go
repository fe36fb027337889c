package nbdserver

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestLimitLog(t *testing.T) {
	var out bytes.Buffer
	h := LimitLog(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})).(*limitedLog)
	now := time.Unix(0, 0)
	h.counts.now = func() time.Time { return now }
	log := slog.New(h)
	lines := func() int {
		defer out.Reset()
		return strings.Count(out.String(), "\n")
	}
	for range 1000 {
		log.With("client", "a").Warn("dropped")
	}
	if n := lines(); n != logBurst {
		t.Errorf("%d lines at once", n)
	}
	log.Warn("another message")
	if n := lines(); n != 1 {
		t.Error("one message keeps another from the log")
	}
	now = now.Add(2*logEvery + time.Second)
	for range 3 {
		log.WithGroup("g").Warn("dropped")
	}
	if !strings.Contains(out.String(), "left_out_before=980") {
		t.Errorf("the log does not say how much it left out: %s", out.String())
	}
	if n := lines(); n != 2 {
		t.Errorf("%d lines after two more periods", n)
	}
	now = now.Add(1000 * logEvery)
	for range 1000 {
		log.Warn("dropped")
	}
	if n := lines(); n != logBurst {
		t.Errorf("%d lines after a long silence", n)
	}
	for range 100 {
		log.Debug("dropped")
	}
	if n := lines(); n != 100 {
		t.Errorf("%d debug lines of 100", n)
	}
}

package repository

import (
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

// TestClocksAskOnce uses a storage whose clock is an hour ahead. Its time is requested once,
// and computed where it need not be exact; where it must be, it is requested each time.
func TestClocksAskOnce(t *testing.T) {
	t.Parallel()
	const ahead = time.Hour
	c := &clocks{now: time.Now, log: slog.New(slog.DiscardHandler)}
	asked := 0
	var fail error
	put := func(opt blob.PutOptions, reckon bool) error {
		return c.put(t.Context(), opt, reckon, func(opt blob.PutOptions) error {
			if opt.GetModTime != nil {
				asked++
				if fail == nil {
					*opt.GetModTime = time.Now().Add(ahead)
				}
			}
			return fail
		})
	}
	near := func(at time.Time) bool { return time.Until(at.Add(-ahead)).Abs() < time.Minute }

	fail = errors.New("full")
	if err := put(blob.PutOptions{}, true); !errors.Is(err, fail) || asked != 1 || c.known.Load() {
		t.Errorf("a write that failed: asked %d times, %v", asked, err)
	}
	fail = nil
	var at time.Time
	if err := put(blob.PutOptions{GetModTime: &at}, true); err != nil || asked != 2 || !near(at) {
		t.Errorf("the first write: asked %d times, %v, %v", asked, at, err)
	}
	if skew := time.Duration(c.skew.Load()); (skew - ahead).Abs() > time.Minute {
		t.Errorf("the storage is %v ahead", skew)
	}
	at = time.Time{}
	if err := put(blob.PutOptions{GetModTime: &at}, true); err != nil || asked != 2 || !near(at) {
		t.Errorf("another marker: asked %d times, %v, %v", asked, at, err)
	}
	if err := put(blob.PutOptions{}, true); err != nil || asked != 2 {
		t.Errorf("a write of which no time is wanted: asked %d times, %v", asked, err)
	}
	at = time.Time{}
	if err := put(blob.PutOptions{GetModTime: &at}, false); err != nil || asked != 3 || !near(at) {
		t.Errorf("a blob whose time must be exact: asked %d times, %v, %v", asked, at, err)
	}
	fail = errors.New("gone")
	at = time.Time{}
	if err := put(blob.PutOptions{GetModTime: &at}, true); !errors.Is(err, fail) || !at.IsZero() {
		t.Errorf("a marker that was not written has a time: %v, %v", at, err)
	}
}

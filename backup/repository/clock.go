package repository

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

// maxClockSkew is the difference between this machine's clock and the storage's above
// which a warning is logged. Stock Kopia's maintenance tolerates the same (kopia
// repo/maintenance/maintenance_run.go).
const maxClockSkew = 5 * time.Minute

// clocks compares this machine's clock with the storage's, once per connection, when the
// first blob is written. Leases, and the ages by which maintenance deletes, use the
// machine's clock; the lease of a reader whose clock is days behind would protect
// nothing.
type clocks struct {
	log   *slog.Logger
	now   func() time.Time
	asked atomic.Bool
	known atomic.Bool
	skew  atomic.Int64 // by how much the storage's clock is ahead
}

type clocksKey struct{}

func withClocks(ctx context.Context, c *clocks) context.Context {
	return context.WithValue(ctx, clocksKey{}, c)
}

func clocksOf(ctx context.Context) *clocks {
	c, _ := ctx.Value(clocksKey{}).(*clocks)
	return c
}

// put writes a blob by do, and asks for the first one when the storage wrote it. On S3 that
// takes another request. Kopia asks for each session marker and index blob, but uses the answer
// only to compare the clocks (kopia repo/content/sessions.go, internal/epoch/epoch_manager.go).
// If reckon is set, put computes their time from this machine's clock and the known skew.
func (c *clocks) put(ctx context.Context, opt blob.PutOptions, reckon bool, do func(blob.PutOptions) error) error {
	if c == nil {
		return do(opt)
	}
	if asked := opt.GetModTime; asked != nil && reckon && c.known.Load() {
		opt.GetModTime = nil
		if err := do(opt); err != nil {
			return err
		}
		*asked = c.now().Add(time.Duration(c.skew.Load()))
		return nil
	}
	if !c.asked.CompareAndSwap(false, true) {
		return do(opt)
	}
	var written time.Time
	if opt.GetModTime == nil {
		opt.GetModTime = &written
	}
	before := c.now()
	err := do(opt)
	if written = *opt.GetModTime; err != nil || written.IsZero() {
		c.asked.Store(false)
		return err
	}
	var skew time.Duration
	switch after := c.now(); {
	case written.After(after):
		skew = written.Sub(after)
	case written.Before(before):
		skew = written.Sub(before)
	}
	c.skew.Store(int64(skew))
	c.known.Store(true)
	if apart := skew.Abs(); apart > maxClockSkew {
		where := "behind"
		if skew < 0 {
			where = "ahead of"
		}
		c.log.WarnContext(ctx, "this machine's clock is "+apart.Round(time.Second).String()+" "+where+
			" the storage's: set it (NTP); until then what this machine reads, writes and deletes is dated wrongly")
	}
	return nil
}

// StorageAhead returns how far the storage's clock is ahead of this machine's. It is
// known after the first write, 0 within five minutes, and negative for a storage that is
// behind.
func (r *Repository) StorageAhead() time.Duration {
	if skew := time.Duration(r.clocks.skew.Load()); skew.Abs() > maxClockSkew {
		return skew
	}
	return 0
}

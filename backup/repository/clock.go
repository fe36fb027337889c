package repository

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

// maxClockSkew is how far this machine's clock and the storage's may be apart before that
// is worth a warning. Stock Kopia's maintenance bears the same (kopia
// repo/maintenance/maintenance_run.go).
const maxClockSkew = 5 * time.Minute

// clocks compares this machine's clock with the storage's, once for each connection: at
// the first blob that it writes. Leases and the ages by which maintenance deletes are
// dated by the machine's; a reader whose clock is days behind would hold nothing.
type clocks struct {
	now   func() time.Time
	asked atomic.Bool
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

// put writes a blob by do, and has it tell when the storage wrote it.
func (c *clocks) put(ctx context.Context, opt blob.PutOptions, do func(blob.PutOptions) error) error {
	if c == nil || opt.GetModTime != nil || !c.asked.CompareAndSwap(false, true) {
		return do(opt)
	}
	var written time.Time
	opt.GetModTime = &written
	before := c.now()
	if err := do(opt); err != nil || written.IsZero() {
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
	if apart := skew.Abs(); apart > maxClockSkew {
		where := "behind"
		if skew < 0 {
			where = "ahead of"
		}
		slog.WarnContext(ctx, "this machine's clock is "+apart.Round(time.Second).String()+" "+where+
			" the storage's: set it (NTP); until then what this machine reads, writes and deletes is dated wrongly")
	}
	return nil
}

// StorageAhead is by how much the storage's clock is ahead of this machine's, as far as
// that is known: after something was written. It is 0 within five minutes, and negative
// for a storage that is behind.
func (r *Repository) StorageAhead() time.Duration {
	if skew := time.Duration(r.clocks.skew.Load()); skew.Abs() > maxClockSkew {
		return skew
	}
	return 0
}

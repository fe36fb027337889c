package nbdserver

import (
	"context"
	"fmt"
	"time"
)

// readTimeout is the cause of a context that ended by Config.ReadTimeout.
type readTimeout struct{ limit time.Duration }

func (e *readTimeout) Error() string {
	return fmt.Sprintf("the data did not arrive within %v, the limit of this server (--read-timeout)", e.limit)
}

// readContext returns the context of one read of the export.
func (c *conn) readContext() (context.Context, context.CancelFunc) {
	limit := c.srv.cfg.ReadTimeout
	if limit <= 0 {
		return c.ctx, func() {}
	}
	return context.WithTimeoutCause(c.ctx, limit, &readTimeout{limit})
}

// late replaces an error that came after the time of a read was over, whatever failed first.
func (c *conn) late(ctx context.Context, err error, off int64) error {
	if err == nil || ctx.Err() == nil || c.ctx.Err() != nil {
		return err
	}
	return &OffsetError{Offset: offsetOf(err, off), Err: fmt.Errorf("%s: %w", c.opened.Name, context.Cause(ctx))}
}

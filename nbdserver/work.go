package nbdserver

import (
	"github.com/varve-io/varve/nbdserver/proto"
)

// refuse answers a request with an error at once.
func (c *conn) refuse(r *request, errno proto.Errno, text string) error {
	if r.mem.n == 0 {
		if err := c.takeMemoryFor(r, minRequestCost); err != nil {
			return err
		}
	}
	c.sendError(r, errno, text, -1)
	return nil
}

// dispatch hands work for a request to a worker, waiting while too many are busy.
func (c *conn) dispatch(work func()) error {
	select {
	case c.slots <- struct{}{}:
	default:
		c.out.flush()
		select {
		case c.slots <- struct{}{}:
		case <-c.ctx.Done():
			return c.ctx.Err()
		}
	}
	c.busy.Add(1)
	c.workers.Add(1)
	go func() {
		defer c.workers.Done()
		_ = c.guard(func() error { work(); return nil })
		c.out.flush()
		<-c.slots
		c.busy.Add(-1)
	}()
	return nil
}

// dispatchChange is dispatch for work that changes the export.
func (c *conn) dispatchChange(work func()) error {
	return c.dispatch(func() {
		// Checked here, since the wait for a worker may have been long.
		ch, ok := c.changes.begin()
		if !ok {
			return // no client waits for the answer
		}
		defer c.changes.end(ch)
		work()
	})
}

// work runs a request that may wait for the export.
func (c *conn) work(r *request) {
	off, length := int64(r.offset), int64(r.length)
	var err error
	switch r.cmd {
	case proto.CmdRead:
		c.read(r)
		return
	case proto.CmdBlockStatus:
		c.blockStatus(r)
		return
	case proto.CmdTrim:
		if length > 0 {
			err = c.writer.Trim(c.ctx, off, length)
		}
	case proto.CmdWriteZeroes:
		if length > 0 {
			err = c.writer.Zero(c.ctx, off, length,
				r.flags&proto.CmdFlagNoHole != 0, r.flags&proto.CmdFlagFastZero != 0)
		}
	case proto.CmdFlush:
		if c.writer != nil {
			err = c.writer.Flush(c.ctx)
		}
	case proto.CmdCache:
		if p, ok := c.opened.Export.(Prefetcher); ok && length > 0 {
			err = p.Prefetch(c.ctx, off, length)
		}
	}
	if err != nil {
		c.exportError(r, err, off)
		return
	}
	c.finish(r)
}

// finish answers a successful request without data, after a flush if FUA is set.
func (c *conn) finish(r *request) {
	if r.flags&proto.CmdFlagFUA != 0 && c.writer != nil && r.cmd != proto.CmdFlush {
		if err := c.writer.Flush(c.ctx); err != nil {
			c.exportError(r, err, int64(r.offset))
			return
		}
	}
	c.sendDone(r)
}

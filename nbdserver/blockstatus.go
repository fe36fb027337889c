package nbdserver

import (
	"context"
	"encoding/binary"
	"math"
	"slices"

	"github.com/varve-io/varve/nbdserver/proto"
)

const (
	// maxStatusExtents is how many extents one reply has, over all contexts. The protocol's
	// own limit, 2^20 per context, would cost 16 MiB per request; a client continues where a
	// reply ends.
	maxStatusExtents = 128 << 10
	// statusMemory is the memory of a block status request: its extents.
	statusMemory = maxStatusExtents * 16
)

// checkStatusPayload validates a BLOCK_STATUS with a list of contexts; the
// payload itself is read later.
func (c *conn) checkStatusPayload(r *request) (proto.Errno, string) {
	switch {
	case c.flags&proto.FlagBlockStatusPayload == 0:
		return proto.EINVAL, "no metadata context was selected"
	case r.length < 8 || (r.length-8)%4 != 0 || r.length > 8+4*maxContexts:
		return proto.EINVAL, "list of metadata contexts is malformed"
	}
	return 0, ""
}

// filterStatus reads the payload of a BLOCK_STATUS: the range's length and the contexts to
// report, each at most once.
func (c *conn) filterStatus(r *request) bool {
	p := r.data.b
	r.length = binary.BigEndian.Uint64(p)
	for p = p[8:]; len(p) > 0; p = p[4:] {
		id := binary.BigEndian.Uint32(p)
		known := slices.ContainsFunc(c.contexts, func(s selectedContext) bool { return s.id == id })
		if !known || slices.Contains(r.only, id) {
			return false
		}
		r.only = append(r.only, id)
	}
	errno, _ := c.checkRange(r)
	if errno != 0 || len(r.only) == 0 {
		return false
	}
	r.data.Release()
	r.data = nil
	return true
}

// blockStatus answers BLOCK_STATUS with one chunk for each context.
func (c *conn) blockStatus(r *request) {
	contexts := c.contexts
	if r.only != nil {
		contexts = slices.DeleteFunc(slices.Clone(contexts), func(s selectedContext) bool {
			return !slices.Contains(r.only, s.id)
		})
	}
	room := maxStatusExtents
	if r.piece > 0 { // memory is short
		room = r.piece / 16
	}
	limit := min(room/len(contexts), proto.MaxExtents)
	if r.flags&proto.CmdFlagReqOne != 0 {
		limit = 1
	}
	ctx, cancel := c.readContext()
	defer cancel()
	out := make([]outgoing, len(contexts))
	for i, s := range contexts {
		runs, err := c.contextRuns(ctx, s.name, int64(r.offset), int64(r.length), limit)
		if err != nil {
			c.exportError(r, c.late(ctx, err, int64(r.offset)), int64(r.offset))
			return
		}
		c.putStatus(&out[i], r, s.id, runs)
	}
	last := &out[len(out)-1]
	setDone(last)
	last.granted = r.mem
	c.count(r, 0)
	c.out.push(out...)
}

// run is an extent of one context.
type run struct {
	length int64
	flags  uint32
}

// contextRuns returns the extents of a range in one context, neighbours with
// equal flags merged, at least one and at most limit of them.
func (c *conn) contextRuns(ctx context.Context, name string, off, length int64, limit int) ([]run, error) {
	longest := int64(math.MaxInt64)
	if c.style != styleExtended {
		longest = math.MaxUint32 &^ 0xffff // fits 32 bits, stays aligned
	}
	var runs []run
	told := int64(0)
	add := func(n int64, flags uint32) bool {
		n = min(n, length-told)
		if n <= 0 {
			return told < length
		}
		last := len(runs) - 1
		if last >= 0 && runs[last].flags == flags {
			fits := min(n, longest-runs[last].length)
			runs[last].length += fits
			told += fits
			n -= fits
		}
		for n > 0 {
			if len(runs) == limit {
				return false
			}
			fits := min(n, longest)
			runs = append(runs, run{length: fits, flags: flags})
			told += fits
			n -= fits
		}
		return told < length
	}
	var err error
	if name == proto.ContextAllocation {
		err = c.opened.Extents(ctx, off, length, func(n int64, hole, zero bool) bool {
			var f uint32
			if hole {
				f |= proto.StateHole
			}
			if zero {
				f |= proto.StateZero
			}
			return add(n, f)
		})
	} else {
		err = c.stat.Status(ctx, name, off, length, add)
	}
	if err != nil && len(runs) == 0 {
		return nil, err
	}
	if len(runs) == 0 { // an export without information: all is data
		add(length, 0)
	}
	return runs, nil
}

// putStatus writes a BLOCK_STATUS chunk.
func (c *conn) putStatus(e *outgoing, r *request, id uint32, runs []run) {
	if c.style == styleExtended {
		p := c.putChunk(e, r, proto.ChunkBlockStatusExt, 8+16*len(runs))
		binary.BigEndian.PutUint32(p, id)
		binary.BigEndian.PutUint32(p[4:], uint32(len(runs)))
		e.hlen += 8
		e.data = make([]byte, 0, 16*len(runs))
		for _, x := range runs {
			e.data = binary.BigEndian.AppendUint64(e.data, uint64(x.length))
			e.data = binary.BigEndian.AppendUint64(e.data, uint64(x.flags))
		}
		return
	}
	p := c.putChunk(e, r, proto.ChunkBlockStatus, 4+8*len(runs))
	binary.BigEndian.PutUint32(p, id)
	e.hlen += 4
	e.data = make([]byte, 0, 8*len(runs))
	for _, x := range runs {
		e.data = binary.BigEndian.AppendUint32(e.data, uint32(x.length))
		e.data = binary.BigEndian.AppendUint32(e.data, x.flags)
	}
}

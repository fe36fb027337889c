package imageio

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"

	"github.com/varve-io/varve/internal/bytesize"
)

// Target is the disk of a transfer as what a restore writes to; it is a
// backup.RestoreTarget. Writes are sent without a flush. What was sent since the last flush
// is kept, at most maxUnflushed bytes of it: when a write fails, the service may have lost
// the earlier ones too, so all of them are sent again (imageio, docs/images.md, "General
// errors").
type Target struct {
	*Disk

	// sending is held shared by each write and alone by what flushes or sends again.
	sending sync.RWMutex
	mu      sync.Mutex
	kept    []written // in the order in which they were begun
	bytes   int64     // of data in kept
	failed  error     // what went wrong since the last flush
	touched []uint64  // a bit for each touchGrain that was written to
}

// written is a write that is not flushed yet.
type written struct {
	off, length int64
	data        []byte // nil for zeroes
}

const (
	// maxUnflushed bounds the memory of kept writes, in bytes.
	maxUnflushed = 64 << 20
	// maxKept bounds their number.
	maxKept = 4096
	// zeroStep is how much one PATCH covers: storage that cannot zero a range writes it.
	zeroStep = 256 << 20
	// touchGrain is how finely it is noted where was written.
	touchGrain = 64 << 10
)

// NewTarget opens the disk of an upload, of at least size bytes.
func NewTarget(ctx context.Context, t *Transfer, size int64, opt Options) (*Target, error) {
	opt.write = true
	d, err := Open(ctx, t, opt)
	if err != nil {
		return nil, err
	}
	if d.size < size {
		return nil, errors.Join(fmt.Errorf("%s: %w: it has %s, and the disk has %s", t, ErrTooSmall, bytesize.Exact(d.size), bytesize.Exact(size)), d.Close())
	}
	if len(d.client.allow) > 0 && !slices.Contains(d.client.allow, http.MethodPut) {
		return nil, errors.Join(fmt.Errorf("%s: %w", t, ErrReadOnly), d.Close())
	}
	return &Target{Disk: d, touched: make([]uint64, d.size/touchGrain/64+1)}, nil
}

// WriteAt implements io.WriterAt. p is kept as a copy until the next flush.
func (t *Target) WriteAt(p []byte, off int64) (int, error) {
	if err := t.inside(off, int64(len(p))); err != nil {
		return 0, err
	}
	for done := 0; done < len(p); {
		some := p[done:min(done+maxRequest, len(p))]
		if t.client.can("flush") {
			some = slices.Clone(some)
		}
		if err := t.write(written{off + int64(done), int64(len(some)), some}); err != nil {
			return done, err
		}
		done += len(some)
	}
	return len(p), nil
}

func (t *Target) inside(off, length int64) error {
	if off < 0 || length < 0 || off > t.size || length > t.size-off {
		return fmt.Errorf("write %s: offset %d, length %d is outside the disk, which has %s", t.client.transfer, off, length, bytesize.Exact(t.size))
	}
	return nil
}

// ZeroRange has a range read as zeroes. What did so when the disk was opened, and was not
// written to since, is left out.
func (t *Target) ZeroRange(off, length int64) error {
	if err := t.inside(off, length); err != nil {
		return err
	}
	step := int64(zeroStep)
	if !t.client.can("zero") {
		step = maxRequest
	}
	for end := off + length; off < end; {
		n, zero := t.stillZero(off, end)
		if !zero {
			n = min(n, step)
			if err := t.write(written{off, n, nil}); err != nil {
				return err
			}
		}
		off += n
	}
	return nil
}

// stillZero says how much follows off, up to end, of which the same is known: that it reads as
// zeroes, or not that.
func (t *Target) stillZero(off, end int64) (n int64, zero bool) {
	if t.zeroes == nil {
		return end - off, false
	}
	i := t.zeroes.at(off)
	end = min(end, t.zeroes.ends[i])
	if !t.zeroes.set(i) {
		return end - off, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	was := t.isTouched(off)
	at := off
	for at < end && t.isTouched(at) == was {
		at = at - at%touchGrain + touchGrain
	}
	return min(at, end) - off, !was
}

func (t *Target) isTouched(off int64) bool {
	g := off / touchGrain
	return t.touched[g/64]&(1<<(g%64)) != 0
}

// write sends a write, and all since the last flush if that fails.
func (t *Target) write(w written) error {
	if !t.client.can("flush") {
		t.keep(w)
		if err := t.client.repeat(func() error { return t.send(w) }); err != nil {
			return t.lost(err)
		}
		return nil
	}
	// Kept, sent and noted as failed as one: a flush between them would forget a write that the
	// service does not have.
	t.sending.RLock()
	full := t.keep(w)
	err := t.send(w)
	if err != nil {
		t.mu.Lock()
		t.failed = err
		t.mu.Unlock()
	}
	t.sending.RUnlock()
	if err != nil || full {
		return t.Sync()
	}
	return nil
}

// keep notes a write before it is sent, and says whether it is time for a flush.
func (t *Target) keep(w written) (full bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for g := w.off / touchGrain; g <= (w.off+w.length-1)/touchGrain; g++ {
		t.touched[g/64] |= 1 << (g % 64)
	}
	if !t.client.can("flush") {
		return false // the service flushes each
	}
	t.kept = append(t.kept, w)
	t.bytes += int64(len(w.data))
	return t.bytes >= maxUnflushed || len(t.kept) >= maxKept
}

// send sends one write, once.
func (t *Target) send(w written) error {
	if w.data == nil && t.client.can("zero") {
		return t.patch(patch{Op: "zero", Offset: w.off, Size: w.length, Flush: !t.client.can("flush")})
	}
	body := w.data
	if body == nil {
		body = make([]byte, w.length)
	}
	r := request{method: http.MethodPut, body: body, header: http.Header{
		"Content-Range": {fmt.Sprintf("bytes %d-%d/*", w.off, w.off+w.length-1)},
		"Content-Type":  {"application/octet-stream"},
	}}
	if t.client.can("flush") {
		r.suffix = "?flush=n"
	}
	return t.client.do(r, http.StatusOK, drain)
}

// patch is the body of a PATCH.
type patch struct {
	Op     string `json:"op"`
	Offset int64  `json:"offset,omitempty"`
	Size   int64  `json:"size,omitempty"`
	Flush  bool   `json:"flush,omitempty"`
}

func (t *Target) patch(p patch) error {
	body, err := json.Marshal(p)
	if err != nil {
		return err
	}
	r := request{method: http.MethodPatch, body: body, header: http.Header{"Content-Type": {"application/json"}}}
	return t.client.do(r, http.StatusOK, drain)
}

// drain reads an answer that says nothing to its end, so that the connection can be used again.
func drain(resp *http.Response) error {
	_, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer))
	return err
}

// Sync has all that was written survive a power cut. If anything failed since the last
// flush, all that was written since is sent again first.
func (t *Target) Sync() error {
	if !t.client.can("flush") {
		return nil // each write was flushed
	}
	t.sending.Lock()
	defer t.sending.Unlock()
	t.mu.Lock()
	kept, failed := t.kept, t.failed
	t.mu.Unlock()
	if failed != nil && !passing(failed) {
		return t.lost(failed)
	}
	if failed == nil {
		if failed = t.patch(patch{Op: "flush"}); failed == nil {
			t.flushed(nil)
			return nil
		}
	}
	err := t.sendAgain(kept, failed)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.failed = err; err != nil {
		return t.lost(err)
	}
	return nil
}

// flushed notes that all but rest is durable.
func (t *Target) flushed(rest []written) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kept, t.bytes = rest, 0
	for _, w := range rest {
		t.bytes += int64(len(w.data))
	}
}

// sendAgain sends writes again and flushes them, all at first. A service that fails before it has
// them all gets fewer at a time, each with a flush, so that one that fails often is left with less
// each time; one that takes nothing for as long as Options.Retry ends the restore.
func (t *Target) sendAgain(kept []written, failed error) error {
	c := t.client
	for piece := max(1, len(kept)); ; piece = max(1, min(2*piece, len(kept))) {
		failures := 0
		err := c.repeat(func() error {
			if failed != nil && !passing(failed) {
				return failed
			}
			if failed != nil {
				c.opt.Log.WarnContext(c.ctx, "a write or a flush failed; what was not flushed is sent again", "writes", len(kept), "at once", piece, "error", failed)
			}
			failed = nil
			for _, w := range kept[:min(piece, len(kept))] {
				if failed = t.send(w); failed != nil {
					break
				}
			}
			if failed == nil {
				failed = t.patch(patch{Op: "flush"})
			}
			if failed != nil {
				failures, piece = failures+1, max(1, piece/2)
			}
			return failed
		})
		if err != nil && failures > 1 {
			return fmt.Errorf("%w: the service failed %d times in a row, and took none of %d writes that were sent again for %s", err, failures, len(kept), c.opt.Retry)
		}
		if err != nil {
			return err
		}
		kept = kept[min(piece, len(kept)):]
		t.flushed(kept)
		if len(kept) == 0 {
			return nil
		}
	}
}

func (t *Target) lost(err error) error {
	return fmt.Errorf("write %s: %w; the disk is incomplete: run the same restore again, with a new transfer", t.client.transfer, err)
}

// Fit does nothing: a disk in oVirt has the size that it has.
func (t *Target) Fit() error { return nil }

// Empty does nothing: zeroing the whole disk may cost as much as writing it.
func (t *Target) Empty() error { return nil }

// Fresh reports whether all that was not written reads as zeroes.
func (t *Target) Fresh() bool {
	return t.zeroes != nil && len(t.zeroes.ends) > 0 && t.zeroes.set(0) && t.zeroes.ends[0] >= t.size
}

// Path names the transfer.
func (t *Target) Path() string { return t.client.transfer.String() }

// Identity is empty: nothing proves that a disk is the one of before, so a restore to it has no
// journal.
func (t *Target) Identity() string { return "" }

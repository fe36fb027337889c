package nbddisk

import (
	"context"
	"errors"
	"fmt"

	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// Target is an export as what a restore writes to; it is a backup.RestoreTarget. A failed
// write is never sent again: the server may have lost what it had acknowledged before.
//
// Zeroes are written with WRITE_ZEROES, never with TRIM: after that vmdk, vhdx, vdi and vpc
// give back the old bytes (QEMU 7.2).
type Target struct {
	*Disk
	fresh bool
}

// ErrTooSmall means that the export has fewer bytes than the disk.
var ErrTooSmall = errors.New("the export is too small")

// NewTarget opens an export of at least size bytes for writing. fresh says that all of it
// reads as zeroes, because it was just made: then zeroes need no writing.
func NewTarget(ctx context.Context, uri *nbdclient.URI, size int64, fresh bool, opt Options) (*Target, error) {
	opt.Write = true
	d, err := Open(ctx, uri, opt)
	if err != nil {
		return nil, err
	}
	if d.Size() < size {
		return nil, errors.Join(fmt.Errorf("%s: %w: it has %s, and the disk has %s", d.opt.Describe, ErrTooSmall,
			bytesize.Exact(d.Size()), bytesize.Exact(size)), d.Close())
	}
	return &Target{Disk: d, fresh: fresh}, nil
}

// writing runs a request that changes the disk, once.
func (t *Target) writing(off int64, do func(*nbdclient.Export) error) error {
	l := t.links[int(t.next.Add(1))%len(t.links)]
	exp, err := t.export(l)
	if err == nil {
		err = do(exp)
	}
	if err == nil {
		return nil
	}
	if t.ctx.Err() != nil {
		return context.Cause(t.ctx)
	}
	var answered *nbdclient.RequestError
	if !errors.As(err, &answered) {
		return fmt.Errorf("write %s at %d: %w; what was written before may be lost too: run the same restore again", t.opt.Describe, off, err)
	}
	return fmt.Errorf("write %s at %d: %w; it is incomplete", t.opt.Describe, off, err)
}

// WriteAt implements io.WriterAt. A piece that is not of the server's smallest block is
// read, completed and written back, which is safe only where no other write is within the
// same block: restores write blocks of 64 KiB and more, and tails.
func (t *Target) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > t.Size() || int64(len(p)) > t.Size()-off {
		return 0, fmt.Errorf("write %s: offset %d, length %d is outside the disk, which has %s", t.opt.Describe, off, len(p), bytesize.Exact(t.Size()))
	}
	grain, most := t.limits()
	for done := 0; done < len(p); {
		at := off + int64(done)
		rest := p[done:]
		into := at % grain
		n := min(int64(len(rest)), most-into)
		if into != 0 || n%grain != 0 {
			if n > grain-into && into == 0 {
				n -= n % grain // the whole blocks first
			} else {
				n = min(n, grain-into)
			}
		}
		chunk := rest[:n]
		if into != 0 || n%grain != 0 {
			start := at - into
			wide := make([]byte, min(grain, t.Size()-start))
			if _, err := t.ReadAt(wide, start); err != nil {
				return done, err
			}
			copy(wide[into:], chunk)
			chunk, at = wide, start
		}
		if err := t.writing(at, func(exp *nbdclient.Export) error { return exp.WriteAt(t.ctx, chunk, at, 0) }); err != nil {
			return done, err
		}
		done += int(n)
	}
	return len(p), nil
}

// ZeroRange has a range read as zeroes. What does so already is left out, as far as
// base:allocation says.
func (t *Target) ZeroRange(off, length int64) error {
	if t.fresh {
		return nil
	}
	if !t.alloc {
		return t.writeZeroes(off, length)
	}
	return t.walk(t.ctx, []string{Allocation}, off, length, func(off, n int64, flags []uint64) error {
		if flags[0]&FlagZero != 0 {
			return nil
		}
		return t.writeZeroes(off, n)
	})
}

// zeroStep is how much one WRITE_ZEROES covers: QEMU splits longer ones itself, but a
// server that writes zeroes in earnest answers only once it is done.
const zeroStep = 64 << 20

func (t *Target) writeZeroes(off, length int64) error {
	grain, _ := t.limits()
	for end := off + length; off < end; {
		n := min(end-off, zeroStep)
		// Its ends as data where they are no whole blocks.
		switch {
		case off%grain != 0:
			n = min(n, grain-off%grain)
		case n > grain:
			n -= n % grain
		}
		var err error
		if t.info.Flags&proto.FlagSendWriteZeroes == 0 || off%grain != 0 || n%grain != 0 {
			n = min(n, maxRequest)
			_, err = t.WriteAt(make([]byte, n), off)
		} else {
			err = t.writing(off, func(exp *nbdclient.Export) error {
				return exp.Command(t.ctx, proto.CmdWriteZeroes, off, n, 0)
			})
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

// Sync has the server make all that was written durable. One FLUSH covers every
// connection where the server offers several (NBD protocol, NBD_FLAG_CAN_MULTI_CONN).
func (t *Target) Sync() error {
	if t.info.Flags&proto.FlagSendFlush == 0 {
		return nil // it has no cache, or no way to flush it
	}
	return t.writing(0, func(exp *nbdclient.Export) error { return exp.Command(t.ctx, proto.CmdFlush, 0, 0, 0) })
}

// Fit does nothing: an export has the size that it has.
func (t *Target) Fit() error { return nil }

// Empty does nothing: zeroing the whole export may cost as much as writing it.
func (t *Target) Empty() error { return nil }

// Fresh reports whether all that was not written reads as zeroes.
func (t *Target) Fresh() bool { return t.fresh }

// Path names the export.
func (t *Target) Path() string { return t.opt.Describe }

// Identity is empty: nothing proves that an export is the one of before, so a restore to
// it has no journal.
func (t *Target) Identity() string { return "" }

// Package nbddisk is a disk on an NBD server, as a backup reads it and a restore writes
// it: several connections, ranges of zeroes from base:allocation, changed ranges from
// dirty bitmaps (qemu:dirty-bitmap:NAME).
//
// The server may be another machine's, a child process (package qemu) or a virtual
// machine's. It is not trusted: what it says is bounded by nbdclient, and a connection that is
// made again must lead to a disk of the same size, name, description, flags and contexts, that
// reads as before where a sample of what was read is read again.
package nbddisk

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/plain"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// Options of Open.
type Options struct {
	// Connections is how many to make where the server allows several; 0 for
	// DefaultConnections.
	Connections int
	// Bitmaps are the dirty bitmaps to be had, without "qemu:dirty-bitmap:". Open fails
	// with ErrNoBitmap if the export lacks one.
	Bitmaps []string
	// Write opens the disk for writing too.
	Write bool
	// Retry is how long a lost connection is tried again; 0 for not at all. Writes are
	// never sent twice: a server that lost its cache would have lost others too.
	Retry time.Duration
	// Patience is how long a server may take to answer a read or a question; 0 for
	// DefaultPatience. A connection that is silent for longer is lost.
	Patience time.Duration
	// Grain is the alignment of requests in bytes, if it is to be more than the server asks
	// for: a power of two.
	Grain int64
	// TLS replaces the certificates of the URI; nil for those.
	TLS *tls.Config
	// Describe names the disk in errors; empty for its URI.
	Describe string
}

// DefaultConnections is the number from which on a local qemu-nbd got no faster.
const DefaultConnections = 4

const (
	// DefaultPatience is more than storage takes that is slow, and less than for ever.
	DefaultPatience = 5 * time.Minute
	// handshakeTime bounds a connection's handshake, for which a server needs no storage.
	handshakeTime = 30 * time.Second
)

// Errors that callers decide by.
var (
	// ErrNoBitmap means that the export has no dirty bitmap of this name.
	ErrNoBitmap = errors.New("the export has no such dirty bitmap")
	// ErrReadOnly means that the server lets no client write to the export.
	ErrReadOnly = errors.New("the export is read-only")
	// ErrOtherDisk means that a connection that was made again leads elsewhere.
	ErrOtherDisk = errors.New("the server has another disk now")
	// ErrSilent means that a server did not answer in time.
	ErrSilent = errors.New("the server does not answer")
)

// Allocation is the metadata context that says where zeroes are.
const Allocation = "base:allocation"

// BitmapContext is the metadata context of a dirty bitmap.
func BitmapContext(name string) string { return "qemu:dirty-bitmap:" + name }

// Disk is an open export. Safe for concurrent use, but for Close.
type Disk struct {
	ctx    context.Context // ends requests; its owner is who opened the disk
	uri    *nbdclient.URI
	opt    Options
	info   nbdclient.Info
	names  []string // contexts to ask for
	alloc  bool     // the server tells base:allocation
	links  []*link
	next   atomic.Uint32
	window windows
	seen   samples
	remade atomic.Bool // a lost connection was made again
}

// link is one connection, made again when it was lost.
type link struct {
	mu  sync.Mutex
	exp *nbdclient.Export // nil: to be made
}

// Open connects to an export. ctx ends all its requests, until Close too.
func Open(ctx context.Context, uri *nbdclient.URI, opt Options) (*Disk, error) {
	if opt.Connections <= 0 {
		opt.Connections = DefaultConnections
	}
	if opt.Patience <= 0 {
		opt.Patience = DefaultPatience
	}
	if opt.Describe == "" {
		opt.Describe = uri.String()
	}
	d := &Disk{ctx: ctx, uri: uri, opt: opt, names: []string{Allocation}}
	for _, b := range opt.Bitmaps {
		d.names = append(d.names, BitmapContext(b))
	}
	first, err := d.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", opt.Describe, err)
	}
	d.info, d.alloc = first.Info, tells(first, Allocation)
	d.links = []*link{{exp: first}}
	if err := d.check(first); err != nil {
		_ = d.Close()
		return nil, fmt.Errorf("open %s: %w", opt.Describe, err)
	}
	if d.info.Flags&proto.FlagCanMultiConn != 0 {
		for len(d.links) < opt.Connections {
			exp, err := d.dial(ctx)
			if err == nil {
				err = d.same(exp)
			}
			if err != nil {
				_ = d.Close()
				return nil, fmt.Errorf("open %s: connection %d: %w", opt.Describe, len(d.links)+1, err)
			}
			d.links = append(d.links, &link{exp: exp})
		}
	}
	return d, nil
}

// dial makes one connection, with the contexts selected.
func (d *Disk) dial(ctx context.Context) (*nbdclient.Export, error) {
	ctx, cancel := silentAfter(ctx, min(handshakeTime, d.opt.Patience))
	defer cancel()
	c, err := nbdclient.Dial(ctx, d.uri, d.opt.TLS)
	if err != nil {
		return nil, silent(ctx, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	exp, err := func() (*nbdclient.Export, error) {
		h, err := c.Negotiate(nbdclient.Extended)
		if err != nil {
			return nil, err
		}
		if h != nbdclient.Simple {
			var refused *nbdclient.RefusedError
			if _, err := c.SetContexts(d.uri.Export, d.names...); err != nil && !errors.As(err, &refused) {
				return nil, err
			}
		}
		return c.Go(d.uri.Export)
	}()
	if !stop() { // what failed then failed by that
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return exp, nil
}

// silentAfter bounds waiting for a server, by ErrSilent.
func silentAfter(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("%w within %v", ErrSilent, limit))
}

// silent returns why ctx ended if it was the server's silence, else err.
func silent(ctx context.Context, err error) error {
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		<-ctx.Done() // a dialer's own timer may have been first
	}
	if cause := context.Cause(ctx); errors.Is(cause, ErrSilent) {
		return cause
	}
	return err
}

// check says whether the export is what was asked for.
func (d *Disk) check(exp *nbdclient.Export) error {
	if exp.Flags&proto.FlagReadOnly != 0 && d.opt.Write {
		return fmt.Errorf("%w; serve it writable", ErrReadOnly)
	}
	for _, b := range d.opt.Bitmaps {
		if !tells(exp, BitmapContext(b)) {
			return fmt.Errorf("%w: %s; 'varve nbd info URI' lists what it has", ErrNoBitmap, b)
		}
	}
	return nil
}

// same compares another connection with the first.
func (d *Disk) same(exp *nbdclient.Export) error {
	err := d.check(exp)
	switch {
	case err != nil:
	case exp.Size != d.info.Size:
		err = fmt.Errorf("%w: of %s instead of %s", ErrOtherDisk, bytesize.Exact(int64(exp.Size)), bytesize.Exact(d.Size()))
	case exp.Name != d.info.Name || exp.Description != d.info.Description:
		err = fmt.Errorf("%w: it calls it %q (%q) instead of %q (%q)", ErrOtherDisk,
			plain.Clip(exp.Name, 100), plain.Clip(exp.Description, 100), plain.Clip(d.info.Name, 100), plain.Clip(d.info.Description, 100))
	case d.alloc != tells(exp, Allocation):
		err = fmt.Errorf("%w: of one connection it says where zeroes are (%s), of another it does not", ErrOtherDisk, Allocation)
	case exp.Flags != d.info.Flags:
		err = fmt.Errorf("%w: it offers other operations (flags %#x instead of %#x)", ErrOtherDisk, uint16(exp.Flags), uint16(d.info.Flags))
	}
	if err != nil {
		_ = exp.Close()
	}
	return err
}

// tells reports whether a context was selected.
func tells(exp *nbdclient.Export, name string) bool {
	for _, n := range exp.Contexts {
		if n == name {
			return true
		}
	}
	return false
}

// Size in bytes.
func (d *Disk) Size() int64 { return int64(d.info.Size) }

// CheckSize finds nothing: an export has one size as long as it is open (NBD protocol,
// "Resize" is an extension that is not negotiated), and another connection must have it too.
func (d *Disk) CheckSize() error { return nil }

// Connections is how many connections are used.
func (d *Disk) Connections() int { return len(d.links) }

// TellsAllocation reports whether the server says where zeroes are.
func (d *Disk) TellsAllocation() bool { return d.alloc }

// Info is what the server said of the export.
func (d *Disk) Info() nbdclient.Info { return d.info }

// Close ends the connections.
func (d *Disk) Close() error {
	var errs []error
	for _, l := range d.links {
		l.mu.Lock()
		if l.exp != nil {
			errs = append(errs, l.exp.Close())
		}
		l.exp = nil
		l.mu.Unlock()
	}
	return errors.Join(errs...)
}

// export gives the link's connection, made again if it was lost.
func (d *Disk) export(l *link) (*nbdclient.Export, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.exp != nil {
		return l.exp, nil
	}
	exp, err := d.dial(d.ctx)
	if err == nil {
		err = d.same(exp)
	}
	if err == nil {
		err = d.again(exp)
	}
	if err != nil {
		return nil, err
	}
	l.exp = exp
	return exp, nil
}

// lost forgets a connection that failed.
func (l *link) lost(exp *nbdclient.Export) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.exp == exp {
		l.exp = nil
		_ = exp.Close()
	}
}

// reading runs a request that changes nothing on one of the connections. Where the
// connection is lost it runs again on another, as long as Options.Retry allows. A server's
// own error, and a breach of the protocol by a server that stays, end it.
func (d *Disk) reading(do func(context.Context, *nbdclient.Export) error) error {
	return d.readingOver(nil, do)
}

// readingOver is reading on one of the connections; nil for any.
func (d *Disk) readingOver(one *link, do func(context.Context, *nbdclient.Export) error) error {
	var deadline time.Time
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		l := one
		if l == nil {
			l = d.links[int(d.next.Add(1))%len(d.links)]
		}
		exp, err := d.export(l)
		if err == nil {
			if err = d.inTime(exp, do); err == nil {
				return nil
			}
			var answered *nbdclient.RequestError
			if errors.As(err, &answered) && answered.Errno != proto.ESHUTDOWN {
				return err
			}
			l.lost(exp)
		}
		switch {
		case d.ctx.Err() != nil:
			return context.Cause(d.ctx)
		case errors.Is(err, ErrOtherDisk) || errors.Is(err, ErrNoBitmap):
			return err
		case deadline.IsZero():
			deadline = time.Now().Add(d.opt.Retry)
		}
		if !time.Now().Add(wait).Before(deadline) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-d.ctx.Done():
			return context.Cause(d.ctx)
		}
	}
}

// inTime runs a request that changes nothing for Options.Patience at most. Its end ends the connection.
func (d *Disk) inTime(exp *nbdclient.Export, do func(context.Context, *nbdclient.Export) error) error {
	ctx, cancel := silentAfter(d.ctx, d.opt.Patience)
	defer cancel()
	err := do(ctx, exp)
	if err != nil {
		err = silent(ctx, err)
	}
	return err
}

// ReadAt implements io.ReaderAt. Long reads are split at what the server takes at once,
// odd ones widened to its smallest block.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s: negative offset %d", d.opt.Describe, off)
	}
	var end error
	if rest := d.Size() - off; rest < int64(len(p)) {
		if rest <= 0 {
			return 0, io.EOF
		}
		p, end = p[:rest], io.EOF
	}
	for done := 0; done < len(p); {
		n, err := d.readSome(p[done:], off+int64(done))
		done += n
		if err != nil {
			return done, fmt.Errorf("read %s at %d: %w", d.opt.Describe, off+int64(done), err)
		}
	}
	return len(p), end
}

// maxRequest is the longest request that is sent: a failed one is repeated whole.
const maxRequest = 8 << 20

// limits are the grain of requests and their greatest length, in bytes.
func (d *Disk) limits() (grain, most int64) {
	grain = max(1, int64(d.info.MinimumBlock), d.opt.Grain)
	most = min(maxRequest, max(int64(d.info.MaximumPayload), grain))
	return grain, max(grain, most/grain*grain)
}

func (d *Disk) readSome(p []byte, off int64) (int, error) {
	grain, most := d.limits()
	into := off % grain
	n := min(int64(len(p)), most-into)
	if into == 0 && (n%grain == 0 || off+n == d.Size()) {
		p = p[:n]
		err := d.reading(func(ctx context.Context, exp *nbdclient.Export) error {
			_, err := exp.ReadAt(ctx, p, off)
			return err
		})
		if err == nil {
			d.sample(p, off)
		}
		return int(n), err
	}
	wide := make([]byte, min((into+n+grain-1)/grain*grain, d.Size()-(off-into)))
	err := d.reading(func(ctx context.Context, exp *nbdclient.Export) error {
		_, err := exp.ReadAt(ctx, wide, off-into)
		return err
	})
	if err != nil {
		return 0, err
	}
	d.sample(wide, off-into)
	return copy(p[:n], wide[into:]), nil
}

// sample remembers some of what was read, for a connection that takes the place of a lost one.
func (d *Disk) sample(p []byte, off int64) {
	if !d.opt.Write {
		grain, _ := d.limits()
		d.seen.offer(p, off, grain)
	}
}

// hasBitmap says whether the bitmap was asked for.
func (d *Disk) hasBitmap(name string) bool { return slices.Contains(d.opt.Bitmaps, name) }

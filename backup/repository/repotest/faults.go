package repotest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"

	"github.com/varve-io/varve/backup/repository"
)

// Op is an operation of blob storage.
type Op string

// Operations that a Fault can hit.
const (
	Get      Op = "get"
	Put      Op = "put"
	Delete   Op = "delete"
	List     Op = "list"
	Metadata Op = "metadata"
)

// ErrInjected is what a Fault without an error of its own answers. Kopia does
// not retry it.
var ErrInjected = errors.New("injected fault")

// ErrNotFound makes a blob look gone.
var ErrNotFound error = blob.ErrBlobNotFound

// Fault is something that goes wrong with storage.
type Fault struct {
	Op     Op     // empty for any
	Prefix string // of the blob ID: "p" data packs, "q" metadata packs, "x" and "n" indexes, "kopia" format; empty for any
	Skip   int    // let so many pass first
	Count  int    // then hit so many; 0 for all

	Err      error         // answered instead of the result; ErrInjected when nothing else is set
	Hold     chan struct{} // the operation waits until it is closed, or its context ends
	Deaf     bool          // Hold goes on when the context ends, as a system call does
	Delay    time.Duration // the operation takes so much longer
	Entered  chan struct{} // closed when the first operation is hit
	Truncate int64         // bytes cut off the end
	FlipBit  int64         // bit to flip, counted from the start of what is transferred, plus one
	Lose     bool          // a Put or Delete reports success and does nothing
	Hide     bool          // a List does not show the blob: storage that lags behind
}

func (f *Fault) silent() bool {
	return f.Hold != nil || f.Delay > 0 || f.Entered != nil || f.Truncate > 0 || f.FlipBit > 0 || f.Lose || f.Hide
}

// Faults injects faults into the storage of one connection. Safe for
// concurrent use; without faults it passes everything on.
type Faults struct {
	mu    sync.Mutex
	rules []*rule
	ops   map[Op]int
	bytes map[Op]int64
}

type rule struct {
	Fault
	seen, hits int
}

// Add injects a fault from now on, after those added before.
func (f *Faults) Add(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &rule{Fault: fault})
}

// Clear removes all faults; operations that are held go on waiting.
func (f *Faults) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = nil
}

// Ops returns how many operations of a kind were started.
func (f *Faults) Ops(op Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ops[op]
}

// Bytes returns how many bytes a kind of operation transferred.
func (f *Faults) Bytes(op Op) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bytes[op]
}

func (f *Faults) transferred(op Op, n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.bytes[op] += n
}

// match returns the fault that hits an operation, if any.
func (f *Faults) match(op Op, id blob.ID, list bool) *Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !list {
		f.ops[op]++
	}
	for _, r := range f.rules {
		if r.Op != "" && r.Op != op || !strings.HasPrefix(string(id), r.Prefix) || r.Hide != list && op == List {
			continue
		}
		if r.seen++; r.seen <= r.Skip || r.Count > 0 && r.hits >= r.Count {
			continue
		}
		if r.hits++; r.hits == 1 && r.Entered != nil {
			close(r.Entered)
		}
		return &r.Fault
	}
	return nil
}

// apply waits and answers as the fault says; nil for no fault.
func (f *Fault) apply(ctx context.Context, op Op, id blob.ID) error {
	if f == nil {
		return nil
	}
	if f.Hold != nil {
		done := ctx.Done()
		if f.Deaf {
			done = nil
		}
		select {
		case <-f.Hold:
		case <-done:
			return ctx.Err()
		}
	}
	if f.Delay > 0 {
		timer := time.NewTimer(f.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if f.Err != nil {
		return f.Err
	}
	if !f.silent() {
		return fmt.Errorf("%s %s: %w", op, id, ErrInjected)
	}
	return nil
}

func (f *Fault) damage(p []byte) []byte {
	if f == nil {
		return p
	}
	if f.Truncate > 0 {
		p = p[:max(0, int64(len(p))-f.Truncate)]
	}
	if bit := f.FlipBit - 1; bit >= 0 && bit/8 < int64(len(p)) {
		p = bytes.Clone(p)
		p[bit/8] ^= 1 << (bit % 8)
	}
	return p
}

// storageType is the name under which the faulty storage is known to Kopia.
const storageType = "varve-faulty"

// storageOptions is what a connection's configuration file holds of it.
type storageOptions struct {
	Path string `json:"path"`
	Name string `json:"name"` // of the Faults
}

var registry = struct {
	sync.Mutex
	faults map[string]*Faults
}{faults: map[string]*Faults{}}

func register(name string) *Faults {
	f := &Faults{ops: map[Op]int{}, bytes: map[Op]int64{}}
	registry.Lock()
	defer registry.Unlock()
	registry.faults[name] = f
	return f
}

func unregister(name string) {
	registry.Lock()
	defer registry.Unlock()
	delete(registry.faults, name)
}

func init() {
	repository.RegisterStorage(storageType, openFaulty)
}

func openFaulty(ctx context.Context, opt *storageOptions, isCreate bool) (blob.Storage, error) {
	registry.Lock()
	f := registry.faults[opt.Name]
	registry.Unlock()
	if f == nil {
		return nil, fmt.Errorf("faulty storage %q is not of this process", opt.Name)
	}
	inner, err := filesystem.New(ctx, &filesystem.Options{Path: opt.Path}, isCreate)
	if err != nil {
		return nil, err
	}
	return &faulty{Storage: inner, opt: *opt, f: f}, nil
}

// faulty is blob storage over a directory that obeys Faults.
type faulty struct {
	blob.Storage
	opt storageOptions
	f   *Faults
}

func (s *faulty) ConnectionInfo() blob.ConnectionInfo {
	return blob.ConnectionInfo{Type: storageType, Config: &s.opt}
}

func (s *faulty) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	fault := s.f.match(Get, id, false)
	if err := fault.apply(ctx, Get, id); err != nil {
		return err
	}
	var buf buffer
	if err := s.Storage.GetBlob(ctx, id, offset, length, &buf); err != nil {
		return err
	}
	p := fault.damage(buf.Bytes())
	s.f.transferred(Get, int64(len(p)))
	out.Reset()
	if _, err := out.Write(p); err != nil {
		return err
	}
	return blob.EnsureLengthExactly(len(p), length)
}

func (s *faulty) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	fault := s.f.match(Put, id, false)
	if err := fault.apply(ctx, Put, id); err != nil {
		return err
	}
	if fault != nil && fault.Lose {
		return nil
	}
	var buf buffer
	if _, err := data.WriteTo(&buf); err != nil {
		return err
	}
	p := fault.damage(buf.Bytes())
	s.f.transferred(Put, int64(len(p)))
	return s.Storage.PutBlob(ctx, id, fixed(p), opts)
}

func (s *faulty) DeleteBlob(ctx context.Context, id blob.ID) error {
	fault := s.f.match(Delete, id, false)
	if err := fault.apply(ctx, Delete, id); err != nil {
		return err
	}
	if fault != nil && fault.Lose {
		return nil
	}
	return s.Storage.DeleteBlob(ctx, id)
}

func (s *faulty) GetMetadata(ctx context.Context, id blob.ID) (blob.Metadata, error) {
	if err := s.f.match(Metadata, id, false).apply(ctx, Metadata, id); err != nil {
		return blob.Metadata{}, err
	}
	return s.Storage.GetMetadata(ctx, id)
}

func (s *faulty) ListBlobs(ctx context.Context, prefix blob.ID, callback func(blob.Metadata) error) error {
	if err := s.f.match(List, prefix, false).apply(ctx, List, prefix); err != nil {
		return err
	}
	return s.Storage.ListBlobs(ctx, prefix, func(md blob.Metadata) error {
		if fault := s.f.match(List, md.BlobID, true); fault != nil {
			return nil
		}
		return callback(md)
	})
}

// buffer collects a blob.
type buffer struct{ bytes.Buffer }

func (b *buffer) Length() int { return b.Len() }

// fixed is a blob's bytes as Kopia wants them.
type fixed []byte

func (p fixed) Length() int { return len(p) }

func (p fixed) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(p)
	return int64(n), err
}

func (p fixed) Reader() io.ReadSeekCloser { return nopCloser{bytes.NewReader(p)} }

type nopCloser struct{ io.ReadSeeker }

func (nopCloser) Close() error { return nil }

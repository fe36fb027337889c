package nbdserver

import (
	"context"
	"errors"
)

// Export is one disk as clients see it. All methods are called concurrently. The context ends
// with the connection.
//
// No type of this package appears in the methods, so that a library can offer them without
// importing it.
type Export interface {
	// Size returns the disk's size in bytes. It never changes while open.
	Size() int64

	// ReadAt fills p from off, both within Size. It returns len(p) and nil, or
	// the number of valid leading bytes and an error.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)

	// Extents reports the runs of [off, off+length) in order and without gaps, until yield
	// returns false. hole: nothing is stored there; zero: it reads as zeroes. The last run
	// may extend beyond off+length but not beyond Size.
	Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error
}

// Writer is an Export that can be changed. A write is visible to every
// connection when WriteAt returns; Flush returns when all that was written,
// trimmed or zeroed before it would survive a crash.
type Writer interface {
	WriteAt(ctx context.Context, p []byte, off int64) (int, error)
	Flush(ctx context.Context) error
	// Trim discards the content of the range.
	Trim(ctx context.Context, off, length int64) error
	// Zero makes the range read as zeroes. With keepSpace it stays (or becomes)
	// allocated, so that a later write there cannot run out of space.
	// With fast it returns ErrNotFast rather than taking as long as a write.
	Zero(ctx context.Context, off, length int64, keepSpace, fast bool) error
}

// ErrNotFast means that Writer.Zero could only write zeroes.
var ErrNotFast = errors.New("zeroing here would be no faster than writing")

// Piece is a run of an export's bytes: Data, or, if Data is nil, Zeroes bytes of zero.
type Piece struct {
	Data   []byte
	Zeroes int
	// Held is how many bytes stay in memory as long as Data is in use, if these are more than
	// Data: those of a block that it is a part of, say, and ends with the capacity of Data.
	Held int
	// Owner, if not nil, is released once the bytes have been sent. Until then
	// Data must not change.
	Owner Releaser
}

// Releaser releases lent memory.
type Releaser interface{ Release() }

// ErrNotCached means that Lender.Lend would have to wait.
var ErrNotCached = errors.New("not in memory")

// Lender is an Export that lends its memory to replies, so that cached blocks
// go to the socket without a copy.
type Lender interface {
	// Lend appends to dst the pieces of [off, off+n), in order. With wait false it never
	// blocks: it returns ErrNotCached if any byte is not in memory. With wait true it fetches
	// what is missing, or returns ErrNotCached to be read with Extents and ReadAt instead. On
	// error, the pieces that it had appended are already released, and dst is returned
	// unchanged, unless the error is of type *OffsetError: then the pieces before that offset
	// are lent as usual.
	Lend(ctx context.Context, dst []Piece, off int64, n int, wait bool) ([]Piece, error)
}

// OffsetError is an error at an offset of the export.
type OffsetError struct {
	Offset int64
	Err    error
}

// Error returns the text of the cause, which reaches the client unchanged.
func (e *OffsetError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *OffsetError) Unwrap() error { return e.Err }

// Prefetcher is an Export that can fetch ahead of reads (NBD_CMD_CACHE). It returns when it
// has accepted the hint; it need not wait for the data.
type Prefetcher interface {
	Prefetch(ctx context.Context, off, length int64) error
}

// Statuser is an Export with metadata contexts beside base:allocation, such as
// qemu:allocation-depth or qemu:dirty-bitmap:NAME.
type Statuser interface {
	// Contexts lists the full names of the contexts, without base:allocation.
	Contexts(ctx context.Context) ([]string, error)
	// HasContext reports whether a client may select the name. It may accept more names than
	// Contexts lists.
	HasContext(ctx context.Context, name string) bool
	// Status reports the runs of [off, off+length) with the context's flags, as
	// Extents does.
	Status(ctx context.Context, name string, off, length int64, yield func(length int64, flags uint32) bool) error
}

// ContextNamer is a Statuser with several names for a context, some of which may mean
// something else later.
type ContextNamer interface {
	// ContextName returns a name that HasContext and Status accept for what name means now,
	// as long as the export is open. For all other names it is the name itself.
	ContextName(ctx context.Context, name string) string
}

// contextName returns the lasting name of a context.
func contextName(ctx context.Context, e any, name string) string {
	if n, ok := e.(ContextNamer); ok {
		return n.ContextName(ctx, name)
	}
	return name
}

// Client is the identity of a client, as far as the connection proves it.
type Client struct {
	// Addr is the peer's address, or the listener's for a unix socket.
	Addr string
	// TLS reports whether the connection is encrypted.
	TLS bool
	// Names are the verified certificate's common name and alternative names
	// (DNS, e-mail, URI); empty without a verified client certificate.
	Names []string
}

// Listing is an export's entry in a listing.
type Listing struct {
	Name        string
	Description string
}

// Opened is an export in use by one connection.
type Opened struct {
	Export
	// Name is the canonical name; never an alias.
	Name        string
	Description string
	// MinimumBlock and PreferredBlock are in bytes, powers of two. Zero means
	// 1 and 4096. The minimum is advertised, never enforced.
	MinimumBlock   uint32
	PreferredBlock uint32
	// ReadOnly refuses writes even if the export is a Writer.
	ReadOnly bool
	// Enter is called when the client stays with the export, before anything is read from it;
	// for a client that only asks about it, it is not called. contexts are the lasting names
	// of the metadata contexts that the client has selected. An error refuses the client,
	// like one of Catalog.Open. It may complete Description. It may be nil.
	Enter func(ctx context.Context, contexts []string) error
	// Close is called once, when the connection no longer uses the export. It
	// may be nil.
	Close func()
}

// writer returns the write side, or nil.
func (o *Opened) writer() Writer {
	if o.ReadOnly {
		return nil
	}
	w, _ := o.Export.(Writer)
	return w
}

func (o *Opened) begin(ctx context.Context, contexts []string) error {
	if o.Enter == nil {
		return nil
	}
	return o.Enter(ctx, contexts)
}

func (o *Opened) close() {
	if o.Close != nil {
		o.Close()
	}
}

// ErrUnknownExport means that an export does not exist, or must be hidden from this client.
var ErrUnknownExport = errors.New("no such export")

// Catalog is the live set of exports. Its methods are called concurrently.
type Catalog interface {
	// List reports all exports the client may open, until yield returns false.
	// It must not cost an Open for each.
	List(ctx context.Context, client Client, yield func(Listing) bool) error
	// Open returns the export of a name, which may be an alias or empty (the default export).
	// The error is ErrUnknownExport, perhaps wrapped, if there is none; the text of any other
	// error is shown to the client.
	Open(ctx context.Context, name string, client Client) (*Opened, error)
}

// Resolver is a Catalog with aliases: names whose meaning changes with time.
type Resolver interface {
	Catalog
	// Resolve returns the canonical name of a name, which is the name itself unless it is an
	// alias; ErrUnknownExport if there is none.
	Resolve(ctx context.Context, name string, client Client) (string, error)
}

// Package repository is the only package that uses Kopia. It opens a Kopia repository and
// gives the rest of Varve four things: contents by object ID, a writer for blocks and
// indexes, snapshot manifests, and maintenance. Nothing above it imports Kopia.
package repository

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/object"
	"golang.org/x/sync/semaphore"
)

// ObjectID names an object: a content ID with "I" before it for each level of
// indirection and "Z" where the object (not the content) is compressed.
// Values are comparable and hold no pointers.
type ObjectID = object.ID

// ContentID names a content by the keyed hash of its bytes.
type ContentID = content.ID

// MaxContentSize is the size limit of one direct object; Kopia splits larger ones. It is
// the largest fixed splitter Kopia has.
const MaxContentSize = 8 << 20

// Sentinel errors for callers.
var (
	// ErrContentMissing means that a content is not in the index, or that its pack is
	// gone, even after a refresh.
	ErrContentMissing = errors.New("content missing")
	// ErrContentCorrupt means that a content's bytes failed authentication or
	// decompression.
	ErrContentCorrupt = errors.New("content corrupt")
	// ErrStorageFailed means that the storage could not be read: nothing is known about
	// the content, and a retry may succeed.
	ErrStorageFailed = errors.New("storage failed")
	// ErrReadOnly means that the connection may not write.
	ErrReadOnly = errors.New("repository is connected read-only")
)

// Repository is an open repository. All methods are safe for concurrent use.
type Repository struct {
	rep    repo.Repository
	direct repo.DirectRepository // nil when connected through a Kopia API server
	config Config

	place   string // where it is, for people
	cluster string
	foreign bool   // made by Kopia or Velero: never written to
	view    bool   // of a Repair: reads only
	release func() // releases the storage's resources, after Close
	grace   time.Duration
	log     *slog.Logger

	damagedIndexes []string // index blobs that OpenForRepair left out

	described *format.KopiaRepositoryJSON // as Attach read it; nil without Attach

	refreshMu  sync.Mutex // serialises refreshes; held during storage calls
	refreshSeq atomic.Uint64

	reads uses // of ReadObject, and calls of Answering; some may outlive their callers

	fatalMu sync.Mutex
	fatal   error

	zero     zeroIDs
	clocks   clocks
	rights   rights
	notes    *sessionNotes       // nil where there are none
	runs     *packRuns           // nil where none are read
	decoding *semaphore.Weighted // of contents that are decoded here
	uncached bool                // Kopia keeps no contents on the disk of this host
	near     *near               // nil behind a Kopia API server, and while it is repaired
}

// ParseObjectID parses the textual form of an object ID.
func ParseObjectID(s string) (ObjectID, error) {
	oid, err := object.ParseID(s)
	if err != nil {
		return ObjectID{}, fmt.Errorf("object ID %q: %w", s, err)
	}
	return oid, nil
}

// Indirect returns the ID of the object whose index is stored as object oid.
func Indirect(oid ObjectID) ObjectID {
	out, err := object.ParseID("I" + oid.String())
	if err != nil { // a valid ID with one more "I" is valid (kopia repo/object/objectid.go)
		panic("repository: " + err.Error())
	}
	return out
}

// Writable reports whether this connection may write.
func (r *Repository) Writable() bool {
	return r.direct != nil && !r.foreign && !r.view && !r.rep.ClientOptions().ReadOnly
}

// Direct reports whether the repository is read from its storage itself, not
// through a Kopia API server.
func (r *Repository) Direct() bool { return r.direct != nil }

// UniqueID is the ID that Kopia gave the repository at its creation, in hexadecimal;
// empty through a Kopia API server.
func (r *Repository) UniqueID() string {
	if r.direct == nil {
		return ""
	}
	return hexID(r.direct.UniqueID())
}

// Answering calls do and returns its error, or ErrUnreachable if a storage request with
// do's context was unanswered for OpenTimeout. It returns soon after ctx ends; a storage
// that ignores its context may keep do running longer, and left is called once do has
// returned. Until then the repository stays open, even if Close returns before.
func (r *Repository) Answering(ctx context.Context, do func(context.Context) error, left func()) error {
	if err := r.reads.begin(ctx); err != nil {
		left()
		return err
	}
	octx, settled, release := boundSilence(context.WithValue(ctx, within{}, &r.reads), OpenTimeout)
	_, err := answered(octx, func() (struct{}, error) {
		defer left()
		defer release()
		defer r.reads.end() // before left, which may close the repository
		return struct{}{}, do(octx)
	}, func(struct{}) {})
	settled()
	if err != nil && errors.Is(context.Cause(octx), errNoAnswer) {
		return explain(octx, r.place, err)
	}
	return err
}

// Now is the repository's clock.
func (r *Repository) Now() time.Time { return r.rep.Time() }

// lateReads is how long Close waits for abandoned reads and calls.
const lateReads = 5 * time.Second

// Close releases the repository. If abandoned reads, or calls of Answering, still wait for the
// storage, it returns after a while and releases the rest once they end: Kopia's indexes are
// mapped memory, and a read of one that was unmapped ends the process.
func (r *Repository) Close(ctx context.Context) error {
	idle := r.reads.close()
	timer := time.NewTimer(lateReads)
	defer timer.Stop()
	select {
	case <-idle:
		return r.close(ctx)
	case <-timer.C:
	}
	go func() {
		<-idle
		_ = r.close(context.WithoutCancel(ctx)) // no caller is left to get it
	}()
	return nil
}

func (r *Repository) close(ctx context.Context) error {
	defer r.release()
	r.saveRecent(ctx)
	if err := r.rep.Close(ctx); err != nil {
		return fmt.Errorf("close repository: %w", err)
	}
	return nil
}

// Fatal returns the error after which Kopia declared the open repository
// unusable (a format upgrade in progress elsewhere), or nil.
func (r *Repository) Fatal() error {
	r.fatalMu.Lock()
	defer r.fatalMu.Unlock()
	return r.fatal
}

// Refresh loads what other processes wrote since the repository was opened.
func (r *Repository) Refresh(ctx context.Context) error {
	r.refreshMu.Lock()
	defer r.refreshMu.Unlock()
	return r.refreshLocked(ctx)
}

// RefreshFlushed loads what other processes wrote until the latest flush of this process, and
// maybe later: Kopia lists the index blobs after it has written one, and that list is reused
// here if it is seconds old.
func (r *Repository) RefreshFlushed(ctx context.Context) error {
	r.refreshMu.Lock()
	defer r.refreshMu.Unlock()
	if r.near != nil {
		r.near.lists.again()
	}
	return r.refreshLocked(ctx)
}

func (r *Repository) refreshLocked(ctx context.Context) error {
	err := r.rep.Refresh(ctx)
	if err != nil && damagedIndex.MatchString(err.Error()) && r.near != nil && r.near.recent.doubt() {
		err = r.rep.Refresh(ctx)
	}
	if err != nil {
		return fmt.Errorf("refresh repository: %w", err)
	}
	r.refreshSeq.Add(1)
	return nil
}

// refreshSince refreshes unless another caller did so after seq was taken: readers that
// miss together pay for one refresh.
func (r *Repository) refreshSince(ctx context.Context, seq uint64) error {
	r.refreshMu.Lock()
	defer r.refreshMu.Unlock()
	if r.refreshSeq.Load() > seq {
		return nil
	}
	return r.refreshLocked(ctx)
}

// RefreshWhenTold disables the refreshes that Kopia does by itself every 15 minutes,
// within a read. If the storage does not answer, such a refresh delays all reads, even
// those served from Kopia's caches. It is for callers of Refresh.
func (r *Repository) RefreshWhenTold() {
	if r.direct != nil {
		r.direct.DisableIndexRefresh()
	}
}

// Ping sends the storage a small request. Unlike Refresh it delays no read if the storage
// does not answer; the error is ErrUnreachable then.
func (r *Repository) Ping(ctx context.Context) error {
	if r.direct == nil {
		return nil
	}
	return r.Answering(ctx, func(ctx context.Context) error {
		_, err := r.direct.BlobReader().GetMetadata(ctx, format.KopiaRepositoryBlobID)
		return err
	}, func() {})
}

// ReadObject returns all of a small object: a block, or a chunk of an index. The caller
// owns the returned bytes. One refresh finds an object that maintenance on another
// machine moved to another pack; after that the error wraps ErrContentMissing or
// ErrContentCorrupt and names the object. It returns when ctx ends, even if the storage
// ignores its context or another reader that waits for the storage holds a lock of
// Kopia's.
func (r *Repository) ReadObject(ctx context.Context, oid ObjectID) ([]byte, error) {
	if err := r.reads.begin(ctx); err != nil {
		return nil, err
	}
	if ctx.Done() == nil {
		defer r.reads.end()
		return r.readRefreshed(ctx, oid)
	}
	type result struct {
		p   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		defer r.reads.end()
		res := result{err: errReadPanicked}
		defer func() {
			if v := recover(); v != nil {
				res.err = fmt.Errorf("%w: %v\n%s", errReadPanicked, v, debug.Stack())
			}
			done <- res
		}()
		res.p, res.err = r.readRefreshed(ctx, oid)
	}()
	select {
	case res := <-done:
		return res.p, res.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

var errReadPanicked = errors.New("reading the object panicked")

func (r *Repository) readRefreshed(ctx context.Context, oid ObjectID) ([]byte, error) {
	seq := r.refreshSeq.Load()
	p, err := r.readObject(ctx, oid)
	if err == nil || !isMissing(err) {
		return p, wrapRead(oid, err)
	}
	if rerr := r.refreshSince(ctx, seq); rerr != nil {
		return nil, errors.Join(wrapRead(oid, err), rerr)
	}
	p, err = r.readObject(ctx, oid)
	return p, wrapRead(oid, err)
}

func (r *Repository) readObject(ctx context.Context, oid ObjectID) ([]byte, error) {
	if cid, compressed, ok := oid.ContentID(); ok && !compressed && r.direct != nil {
		return r.readContent(ctx, cid)
	}
	// Compressed objects (format version 1), objects behind a Kopia API server
	// and indexes that are themselves indirect go through Kopia's object reader.
	rd, err := r.rep.OpenObject(ctx, oid)
	if err != nil {
		return nil, err
	}
	defer rd.Close()
	if n := rd.Length(); n > maxIndexBytes {
		return nil, fmt.Errorf("object is %d bytes long, more than %d", n, int64(maxIndexBytes))
	}
	return io.ReadAll(rd)
}

// maxIndexBytes bounds an index read into memory: a flat table of 1 MiB
// entries takes about 75 bytes each, so this is a disk of about 14 TiB.
const maxIndexBytes = 1 << 30

func isMissing(err error) bool {
	return errors.Is(err, content.ErrContentNotFound) ||
		errors.Is(err, blob.ErrBlobNotFound) ||
		errors.Is(err, object.ErrObjectNotFound)
}

// ObjectError is a read error that names the object. It wraps ErrContentMissing,
// ErrContentCorrupt or ErrStorageFailed.
type ObjectError struct {
	Object ObjectID
	Err    error
}

func (e *ObjectError) Error() string { return fmt.Sprintf("object %v: %v", e.Object, e.Err) }

func (e *ObjectError) Unwrap() error { return e.Err }

func wrapRead(oid ObjectID, err error) error {
	kind := ErrStorageFailed
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case isMissing(err):
		kind = ErrContentMissing
	case isCorrupt(err):
		kind = ErrContentCorrupt
	}
	return &ObjectError{oid, fmt.Errorf("%w: %w", kind, err)}
}

// ContentState is the index entry of a content.
type ContentState struct {
	Found   bool
	Deleted bool   // marked by garbage collection; its bytes may be deleted any time
	Pack    string // blob that holds it; empty while it waits in a writer
	Offset  int64  // where in the pack it begins
	Packed  int64  // bytes it uses in the pack
	Length  int64  // bytes it decodes to
	Written time.Time
}

// StateOf looks a content up in the index, without reading it.
func (r *Repository) StateOf(ctx context.Context, oid ObjectID) (ContentState, error) {
	cid, _, ok := contentOf(oid)
	if !ok {
		return ContentState{}, fmt.Errorf("object %v has no single content", oid)
	}
	info, err := r.rep.ContentInfo(ctx, cid)
	return contentState(info, err)
}

func contentState(info content.Info, err error) (ContentState, error) {
	if errors.Is(err, content.ErrContentNotFound) {
		return ContentState{}, nil
	}
	if err != nil {
		return ContentState{}, fmt.Errorf("look up content: %w", err)
	}
	return ContentState{
		Found:   true,
		Deleted: info.Deleted,
		Pack:    string(info.PackBlobID),
		Offset:  int64(info.PackOffset),
		Packed:  int64(info.PackedLength),
		Length:  int64(info.OriginalLength),
		Written: info.Timestamp(),
	}, nil
}

// contentOf returns the content that an ID of any indirection names: the data
// itself, or the index of it.
func contentOf(oid ObjectID) (cid ContentID, levels int, ok bool) {
	for {
		inner, indirect := oid.IndexObjectID()
		if !indirect {
			cid, _, ok = oid.ContentID()
			return cid, levels, ok
		}
		oid = inner
		levels++
	}
}

// IsIndirect reports whether oid names an index of other objects, and returns
// the object that holds that index.
func IsIndirect(oid ObjectID) (index ObjectID, ok bool) { return oid.IndexObjectID() }

// PackExists reports whether a pack blob is in storage.
func (r *Repository) PackExists(ctx context.Context, pack string) (bool, error) {
	_, ok, err := r.PackSize(ctx, pack)
	return ok, err
}

// PackSize returns the size of a pack blob in storage, in bytes; ok is false if there is
// none.
func (r *Repository) PackSize(ctx context.Context, pack string) (size int64, ok bool, err error) {
	if r.direct == nil {
		return 0, false, fmt.Errorf("pack %s: no direct storage access through a Kopia API server", pack)
	}
	md, err := r.direct.BlobReader().GetMetadata(ctx, blob.ID(pack))
	if errors.Is(err, blob.ErrBlobNotFound) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("look up pack %s: %w", pack, err)
	}
	return md.Length, true, nil
}

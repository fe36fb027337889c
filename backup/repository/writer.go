package repository

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
)

const (
	indexPrefix     content.IDPrefix = "x" // indirect indexes, as in kopia repo/object/object_writer.go
	directoryPrefix content.IDPrefix = "k" // directories, as in kopia snapshot/snapshotfs
)

// Writer is one write session. WriteBlock and WriteIndex may be called concurrently;
// Flush waits until running calls are packed. Writes are visible to others, and survive a
// crash, only after a Flush.
type Writer struct {
	r   *Repository
	ctx context.Context // Kopia binds a session's logger and spans to its context
	w   repo.DirectRepositoryWriter

	blockCompressor, indexCompressor compression.Name

	contents contentWriter // nil if objects must be written

	uploaded  atomic.Int64
	flushGate sync.RWMutex
	release   func() // ends the session's context
}

// DefaultGrace is how long a write session continues after its caller's context was
// cancelled, so that running writes can still be stored and found by the next run. After
// it, a storage that hangs is given up.
const DefaultGrace = 10 * time.Second

// sessionContext returns a context that is cancelled grace after parent is, or
// by release.
func sessionContext(parent context.Context, grace time.Duration) (ctx context.Context, release func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(parent))
	stop := context.AfterFunc(parent, func() {
		timer := time.AfterFunc(grace, cancel)
		context.AfterFunc(ctx, func() { timer.Stop() })
	})
	return ctx, func() {
		stop()
		cancel()
	}
}

// NewWriter opens a write session. It outlives ctx by the grace of OpenOptions; Close
// ends it. The error is ErrDenied if this client may not delete objects in the storage.
func (r *Repository) NewWriter(ctx context.Context, purpose string) (*Writer, error) {
	if !r.Writable() {
		return nil, fmt.Errorf("%w: %s", ErrReadOnly, r.readOnlyReason())
	}
	return r.newWriter(ctx, purpose)
}

func (r *Repository) newWriter(ctx context.Context, purpose string) (*Writer, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	sctx, release := sessionContext(ctx, r.grace)
	w := &Writer{r: r, release: release}
	wctx, dw, err := r.direct.NewDirectWriter(withWriter(sctx, w), repo.WriteSessionOptions{
		Purpose:  purpose,
		OnUpload: func(n int64) { w.uploaded.Add(n) },
	})
	if err != nil {
		release()
		return nil, fmt.Errorf("open write session: %w", err)
	}
	if err := r.checkDelete(wctx, dw.BlobStorage()); err != nil {
		err = errors.Join(fmt.Errorf("open write session: %w", err), dw.Close(context.WithoutCancel(wctx)))
		release()
		return nil, err
	}
	w.ctx, w.w = wctx, dw
	w.contents = contentsOf(dw)
	w.blockCompressor = compression.Name(r.config.Compression)
	w.indexCompressor = indexCompression
	return w, nil
}

// indexCompression is used for indexes, independent of the choice for blocks: it halves
// their JSON at almost no cost.
const indexCompression = "zstd-fastest"

// Close abandons what was not flushed.
func (w *Writer) Close() error {
	defer w.release()
	defer w.r.notes.abandon(w)
	if err := w.w.Close(context.WithoutCancel(w.ctx)); err != nil {
		return fmt.Errorf("close write session: %w", err)
	}
	return nil
}

// Uploaded returns the bytes sent to storage by this session so far.
func (w *Writer) Uploaded() int64 { return w.uploaded.Load() }

// WriteBlock stores p (at most MaxContentSize bytes) as a direct object. A content that
// the repository has is not stored again. p may be reused after the call.
func (w *Writer) WriteBlock(ctx context.Context, p []byte) (ObjectID, error) {
	return w.writeDirect(ctx, p, "", w.blockCompressor)
}

// WriteIndex stores p, a piece of an index, as a direct object among the
// repository's metadata.
func (w *Writer) WriteIndex(ctx context.Context, p []byte) (ObjectID, error) {
	return w.writeDirect(ctx, p, indexPrefix, w.indexCompressor)
}

func (w *Writer) writeDirect(ctx context.Context, p []byte, prefix content.IDPrefix, comp compression.Name) (ObjectID, error) {
	if len(p) > MaxContentSize {
		return ObjectID{}, fmt.Errorf("object of %d bytes does not fit one content", len(p))
	}
	if err := ctx.Err(); err != nil {
		return ObjectID{}, err
	}
	w.flushGate.RLock()
	defer w.flushGate.RUnlock()
	if w.contents != nil {
		id, err := w.contents(w.ctx, p, prefix, headerOf(comp))
		if err != nil {
			return ObjectID{}, fmt.Errorf("write content: %w", explainWrite(err))
		}
		return object.DirectObjectID(id), nil
	}
	return w.writeObject(p, prefix, comp)
}

// writeObject stores p as an object of one content.
func (w *Writer) writeObject(p []byte, prefix content.IDPrefix, comp compression.Name) (ObjectID, error) {
	ow := w.w.NewObjectWriter(w.ctx, object.WriterOptions{
		Description: "varve",
		Prefix:      prefix,
		Compressor:  comp,
		Splitter:    "FIXED-8M", // at least MaxContentSize: one content, one ID
	})
	defer ow.Close()
	if _, err := ow.Write(p); err != nil {
		return ObjectID{}, fmt.Errorf("write object: %w", explainWrite(err))
	}
	oid, err := ow.Result()
	if err != nil {
		return ObjectID{}, fmt.Errorf("write object: %w", explainWrite(err))
	}
	if _, _, ok := oid.ContentID(); !ok {
		return ObjectID{}, fmt.Errorf("object %v of %d bytes was split", oid, len(p))
	}
	return oid, nil
}

// Flush packs and uploads the writes and makes them visible to others.
func (w *Writer) Flush(ctx context.Context) error {
	w.flushGate.Lock()
	defer w.flushGate.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := w.w.Flush(w.ctx); err != nil {
		return fmt.Errorf("flush to storage: %w", explainWrite(err))
	}
	return nil
}

// Refresh makes the session see what others have written and deleted.
func (w *Writer) Refresh(_ context.Context) error {
	if err := w.w.Refresh(w.ctx); err != nil {
		return fmt.Errorf("refresh repository: %w", err)
	}
	return nil
}

// Reader reads as this session sees the repository, including its unflushed writes.
func (w *Writer) Reader() *SessionReader { return &SessionReader{w} }

// SessionReader reads what a Writer can see.
type SessionReader struct{ w *Writer }

// ReadObject is Repository.ReadObject as the session sees it.
func (s *SessionReader) ReadObject(ctx context.Context, oid ObjectID) ([]byte, error) {
	return s.w.ReadObject(ctx, oid)
}

// ZeroID is Repository.ZeroID.
func (s *SessionReader) ZeroID(ctx context.Context, n int64) (ObjectID, error) {
	return s.w.r.ZeroID(ctx, n)
}

// ReadObject is Repository.ReadObject, and sees what this session wrote.
func (w *Writer) ReadObject(ctx context.Context, oid ObjectID) ([]byte, error) {
	if cid, compressed, ok := oid.ContentID(); ok && !compressed {
		p, err := w.w.ContentReader().GetContent(ctx, cid)
		if err == nil {
			return p, nil
		}
	}
	return w.r.ReadObject(ctx, oid)
}

// StateOf is Repository.StateOf as this session sees it.
func (w *Writer) StateOf(_ context.Context, oid ObjectID) (ContentState, error) {
	cid, _, ok := contentOf(oid)
	if !ok {
		return ContentState{}, fmt.Errorf("object %v has no single content", oid)
	}
	info, err := w.w.ContentInfo(w.ctx, cid)
	return contentState(info, err)
}

// deleteManifest deletes a manifest; a missing one is no error.
func (w *Writer) deleteManifest(id string) error {
	if err := w.refreshing(func() error { return w.w.DeleteManifest(w.ctx, manifest.ID(id)) }); err != nil {
		return fmt.Errorf("delete manifest %s: %w", id, explainWrite(err))
	}
	return nil
}

// unreadableManifests is Repository.UnreadableManifests as this session sees it.
func (w *Writer) unreadableManifests(ctx context.Context) ([]UnreadableManifests, error) {
	m, ok := w.w.(*manifestSession)
	if !ok {
		return nil, nil
	}
	v, err := m.reader.view(ctx)
	if err != nil {
		return nil, fmt.Errorf("read manifests: %w", err)
	}
	return v.unreadable, nil
}

func directID(cid ContentID) ObjectID { return object.DirectObjectID(cid) }

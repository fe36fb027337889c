package repository

import (
	"context"
	"errors"
	"fmt"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/azure"
	"github.com/kopia/kopia/repo/blob/b2"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/blob/gcs"
	"github.com/kopia/kopia/repo/blob/rclone"
	"github.com/kopia/kopia/repo/blob/s3"
	"github.com/kopia/kopia/repo/blob/sftp"
	"github.com/kopia/kopia/repo/blob/webdav"
	"github.com/kopia/kopia/repo/format"
)

// Kopia opens the storage of a connection by the name of its kind, and offers no hook
// between storage and repository to watch the calls (kopia repo/open.go, openDirect). So
// the kinds are registered again, after Kopia's own packages did so; the names are those
// of the packages.
func init() {
	RegisterStorage("filesystem", filesystem.New)
	RegisterStorage("s3", s3.New)
	RegisterStorage("gcs", gcs.New)
	RegisterStorage("azureBlob", azure.New)
	RegisterStorage("b2", b2.New)
	RegisterStorage("sftp", sftp.New)
	RegisterStorage("webdav", webdav.New)
	RegisterStorage("rclone", rclone.New)
}

// RegisterStorage registers a kind of storage with Kopia, with its calls watched as Open
// and Connect need it. It is for kinds used by tests; call it from an init.
func RegisterStorage[T any](kind string, open func(ctx context.Context, opt *T, create bool) (blob.Storage, error)) {
	var none T
	blob.AddSupportedStorage(kind, none, func(ctx context.Context, opt *T, create bool) (blob.Storage, error) {
		return watch(ctx, func() (blob.Storage, error) { return open(ctx, opt, create) })
	})
}

// watch opens a storage and reports its calls, and the opening, to the silence of their
// context.
func watch(ctx context.Context, open func() (blob.Storage, error)) (blob.Storage, error) {
	s := silenceOf(ctx)
	s.begin()
	st, err := open()
	s.end(err == nil)
	if err != nil {
		return nil, err
	}
	notes := notesOf(ctx)
	notes.opened(st)
	w := &watched{explainDenials(st), clocksOf(ctx), hiddenOf(ctx), notes, runsOf(ctx), nearOf(ctx)}
	w.runs.use(w.Storage)
	w.near.opened(ctx, w.Storage)
	return w, nil
}

// watched is a storage that reports its calls.
type watched struct {
	blob.Storage
	clocks *clocks      // nil while a repository is created
	hidden *hiddenBlobs // nil for none
	notes  *sessionNotes
	runs   *packRuns // nil for storages on this machine
	near   *near     // nil while a repository is created or repaired
}

// errRangeIgnored means that a storage returned other bytes than those requested.
var errRangeIgnored = errors.New("the storage, or a proxy before it, ignores byte ranges, which varve needs: have the proxy pass the Range header")

// isAnswer distinguishes an answer from a failure.
func isAnswer(err error) bool { return err == nil || errors.Is(err, blob.ErrBlobNotFound) }

func (w *watched) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	if s := silenceOf(ctx); s != nil {
		out = &heardBuffer{out, s}
	}
	err := w.call(ctx, func() error {
		if p, ok := w.runs.read(ctx, id, offset, length); ok {
			out.Reset()
			_, err := out.Write(p)
			return err
		}
		if p, ok, err := w.near.read(ctx, id, offset, length); ok {
			out.Reset()
			if err == nil {
				_, err = out.Write(p)
			}
			return err
		}
		return w.near.keepRead(id, offset, length, out, func(out blob.OutputBuffer) error {
			return w.Storage.GetBlob(ctx, id, offset, length, out)
		})
	})
	if length > 0 && errors.Is(err, blob.ErrInvalidRange) && int64(out.Length()) > length {
		// Not the requested bytes, so nothing is known about those.
		return fmt.Errorf("%w: asked for %d bytes of %s, got %d", errRangeIgnored, length, id, out.Length())
	}
	// Kopia's last request before it derives the key, of a repository that it opens or
	// makes.
	if id == format.KopiaRepositoryBlobID && err == nil || id == format.KopiaBlobCfgBlobID && errors.Is(err, blob.ErrBlobNotFound) {
		if terr := keyTurn(ctx).take(ctx); terr != nil {
			return terr
		}
	}
	return err
}

// heardBuffer notes what arrives of a blob.
type heardBuffer struct {
	blob.OutputBuffer
	s *silence
}

func (b *heardBuffer) Write(p []byte) (int, error) {
	b.s.heard()
	return b.OutputBuffer.Write(p)
}

func (w *watched) ListBlobs(ctx context.Context, prefix blob.ID, do func(blob.Metadata) error) error {
	keyTurn(ctx).done()
	s := silenceOf(ctx)
	s.begin()
	var stopped error
	heard := func(ctx context.Context, prefix blob.ID, do func(blob.Metadata) error) error {
		return w.Storage.ListBlobs(ctx, prefix, func(m blob.Metadata) error {
			s.heard()
			return do(m)
		})
	}
	visible := func(m blob.Metadata) error {
		if w.hidden.has(m.BlobID) {
			return nil
		}
		stopped = do(m)
		return stopped
	}
	answered, err := w.near.list(ctx, prefix, heard, visible)
	if !answered {
		err = heard(ctx, prefix, visible)
	}
	s.end(err == nil || stopped != nil)
	return err
}

func (w *watched) GetMetadata(ctx context.Context, id blob.ID) (m blob.Metadata, err error) {
	err = w.call(ctx, func() (err error) { m, err = w.Storage.GetMetadata(ctx, id); return err })
	return m, err
}

func (w *watched) GetCapacity(ctx context.Context) (c blob.Capacity, err error) {
	err = w.call(ctx, func() (err error) { c, err = w.Storage.GetCapacity(ctx); return err })
	return c, err
}

// PutBlob counts as heard when it is done: writes while a repository is opened or created
// are small.
func (w *watched) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opt blob.PutOptions) error {
	w.notes.writing(ctx, id)
	w.near.changing(id)
	err := w.call(ctx, func() error {
		return w.clocks.put(ctx, opt, w.near.reckons(id), func(opt blob.PutOptions) error { return w.Storage.PutBlob(ctx, id, data, opt) })
	})
	w.near.wrote(id, data, err)
	if errors.Is(err, ErrDenied) {
		w.notes.deleted(id) // a session that could not begin
	}
	w.runs.forget(id)
	return err
}

func (w *watched) DeleteBlob(ctx context.Context, id blob.ID) error {
	w.near.changing(id)
	err := w.call(ctx, func() error { return w.Storage.DeleteBlob(ctx, id) })
	w.near.deleted(id)
	if isAnswer(err) {
		w.notes.deleted(id)
	}
	w.runs.forget(id)
	return err
}

func (w *watched) ExtendBlobRetention(ctx context.Context, id blob.ID, opt blob.ExtendOptions) error {
	return w.call(ctx, func() error { return w.Storage.ExtendBlobRetention(ctx, id, opt) })
}

func (w *watched) FlushCaches(ctx context.Context) error {
	return w.call(ctx, func() error { return w.Storage.FlushCaches(ctx) })
}

func (w *watched) Close(ctx context.Context) error {
	w.notes.close()
	w.runs.close()
	w.near.close()
	return w.Storage.Close(ctx) //nolint:wrapcheck // the storage's own
}

func (w *watched) call(ctx context.Context, do func() error) error {
	keyTurn(ctx).done()
	s := silenceOf(ctx)
	s.begin()
	err := do()
	s.end(isAnswer(err))
	w.near.heard(isAnswer(err))
	return err
}

package repository

import (
	"context"
	"errors"

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

// Kopia opens the storage of a connection by the name of its kind, and offers no
// place between storage and repository to watch the calls from (kopia
// repo/open.go, openDirect). So the kinds are registered anew, after Kopia's own
// packages did so; the names are those of the packages.
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

// RegisterStorage makes a kind of storage known to Kopia, with its calls watched
// as Open and Connect need it. For kinds of tests; to be called by an init.
func RegisterStorage[T any](kind string, open func(ctx context.Context, opt *T, create bool) (blob.Storage, error)) {
	var none T
	blob.AddSupportedStorage(kind, none, func(ctx context.Context, opt *T, create bool) (blob.Storage, error) {
		return watch(ctx, func() (blob.Storage, error) { return open(ctx, opt, create) })
	})
}

// watch opens a storage and has its calls heard by the silence of their context,
// as the opening is.
func watch(ctx context.Context, open func() (blob.Storage, error)) (blob.Storage, error) {
	s := silenceOf(ctx)
	s.begin()
	st, err := open()
	s.end(err == nil)
	if err != nil {
		return nil, err
	}
	return &watched{st, clocksOf(ctx)}, nil
}

// watched is a storage that tells of its calls.
type watched struct {
	blob.Storage
	clocks *clocks // nil while a repository is created
}

// isAnswer distinguishes an answer from a failure.
func isAnswer(err error) bool { return err == nil || errors.Is(err, blob.ErrBlobNotFound) }

func (w *watched) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	if s := silenceOf(ctx); s != nil {
		out = &heardBuffer{out, s}
	}
	err := w.call(ctx, func() error { return w.Storage.GetBlob(ctx, id, offset, length, out) })
	// What Kopia asks for last before it derives the key, of a repository that it
	// opens or makes.
	if id == format.KopiaRepositoryBlobID && err == nil || id == format.KopiaBlobCfgBlobID && errors.Is(err, blob.ErrBlobNotFound) {
		if terr := keyTurn(ctx).take(ctx); terr != nil {
			return terr
		}
	}
	return err
}

// heardBuffer hears what arrives of a blob.
type heardBuffer struct {
	blob.OutputBuffer
	s *silence
}

func (b *heardBuffer) Write(p []byte) (int, error) {
	b.s.heard()
	return b.OutputBuffer.Write(p) //nolint:wrapcheck // the storage's own
}

func (w *watched) ListBlobs(ctx context.Context, prefix blob.ID, do func(blob.Metadata) error) error {
	keyTurn(ctx).done()
	s := silenceOf(ctx)
	s.begin()
	var stopped error
	err := w.Storage.ListBlobs(ctx, prefix, func(m blob.Metadata) error {
		s.heard()
		stopped = do(m)
		return stopped
	})
	s.end(err == nil || stopped != nil)
	return err //nolint:wrapcheck // Kopia decides by it
}

func (w *watched) GetMetadata(ctx context.Context, id blob.ID) (m blob.Metadata, err error) {
	err = w.call(ctx, func() (err error) { m, err = w.Storage.GetMetadata(ctx, id); return err })
	return m, err
}

func (w *watched) GetCapacity(ctx context.Context) (c blob.Capacity, err error) {
	err = w.call(ctx, func() (err error) { c, err = w.Storage.GetCapacity(ctx); return err })
	return c, err
}

// PutBlob is heard when it is done: what is written while a repository is opened
// or created is small.
func (w *watched) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opt blob.PutOptions) error {
	return w.call(ctx, func() error {
		return w.clocks.put(ctx, opt, func(opt blob.PutOptions) error { return w.Storage.PutBlob(ctx, id, data, opt) })
	})
}

func (w *watched) DeleteBlob(ctx context.Context, id blob.ID) error {
	return w.call(ctx, func() error { return w.Storage.DeleteBlob(ctx, id) })
}

func (w *watched) ExtendBlobRetention(ctx context.Context, id blob.ID, opt blob.ExtendOptions) error {
	return w.call(ctx, func() error { return w.Storage.ExtendBlobRetention(ctx, id, opt) })
}

func (w *watched) FlushCaches(ctx context.Context) error {
	return w.call(ctx, func() error { return w.Storage.FlushCaches(ctx) })
}

func (w *watched) call(ctx context.Context, do func() error) error {
	keyTurn(ctx).done()
	s := silenceOf(ctx)
	s.begin()
	err := do()
	s.end(isAnswer(err))
	return err
}

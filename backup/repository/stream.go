package repository

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
)

// StreamWriter stores a stream of bytes as one object. A Kopia splitter cuts it by its
// content, so that streams that differ in places share the rest, even if it has moved. Only
// one goroutine may use it, the one that flushes the Writer.
type StreamWriter struct {
	w  *Writer
	ow object.Writer
}

// Splitters of streams (kopia repo/splitter): with the first, contents have 128 KiB on average,
// with the others 1 MiB and 4 MiB. Kopia's writer holds the list of contents in memory, about
// 100 bytes each.
const (
	SplitSmall  = "DYNAMIC-128K-BUZHASH"
	SplitMedium = "DYNAMIC-1M-BUZHASH"
	SplitLarge  = "DYNAMIC-4M-BUZHASH"
)

// NewStream begins a stream. Close it.
func (w *Writer) NewStream(splitter string) *StreamWriter {
	return &StreamWriter{w: w, ow: w.w.NewObjectWriter(w.ctx, object.WriterOptions{
		Description: "varve stream", Compressor: w.blockCompressor, MetadataCompressor: compression.Name(indexCompression),
		Splitter: splitter, AsyncWrites: runtime.NumCPU(),
	})}
}

// Write adds to the stream.
func (s *StreamWriter) Write(p []byte) (int, error) {
	n, err := s.ow.Write(p)
	if err != nil {
		return n, fmt.Errorf("write content: %w", explainWrite(err))
	}
	return n, nil
}

// Checkpoint returns an object of the n bytes stored so far, which may be fewer than were
// written; if n is 0 there is no object. No write to the repository is running when it returns.
func (s *StreamWriter) Checkpoint() (oid ObjectID, n int64, err error) {
	oid, err = s.ow.Checkpoint()
	if err != nil {
		return oid, 0, fmt.Errorf("write object: %w", explainWrite(err))
	}
	if oid == object.EmptyID {
		return oid, 0, nil
	}
	r, err := s.w.w.OpenObject(s.w.ctx, oid)
	if err != nil {
		return oid, 0, fmt.Errorf("open object %v: %w", oid, err)
	}
	return oid, r.Length(), r.Close()
}

// Result ends the stream and returns its object.
func (s *StreamWriter) Result() (ObjectID, error) {
	oid, err := s.ow.Result()
	if err != nil {
		return oid, fmt.Errorf("write object: %w", explainWrite(err))
	}
	return oid, nil
}

// Close releases the stream's resources.
func (s *StreamWriter) Close() error { return s.ow.Close() }

// ContentsOf returns the direct objects that an object consists of, those of its indexes
// included, as this session sees it. The error is ErrContentMissing if one is in no index.
func (w *Writer) ContentsOf(_ context.Context, oid ObjectID) ([]ObjectID, error) {
	ids, err := w.w.VerifyObject(w.ctx, oid)
	if errors.Is(err, content.ErrContentNotFound) || errors.Is(err, object.ErrObjectNotFound) {
		return nil, fmt.Errorf("object %v: %w: %w", oid, ErrContentMissing, err)
	}
	if err != nil {
		return nil, fmt.Errorf("contents of object %v: %w", oid, err)
	}
	out := make([]ObjectID, len(ids))
	for i, id := range ids {
		out[i] = directID(id)
	}
	return out, nil
}

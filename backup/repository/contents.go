package repository

import (
	"context"
	"reflect"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
)

// contentWriter hashes p and stores it as one content, unless the repository has it. It does
// not retain p.
type contentWriter func(ctx context.Context, p []byte, prefix content.IDPrefix, comp compression.HeaderID) (content.ID, error)

// contentsOf writes contents without Kopia's object writer, which copies each block before it
// hashes it, even one that is not stored in the end. It returns nil where an object is more than
// its content: repositories of format 1 compress objects (kopia repo/object/object_writer.go).
func contentsOf(w repo.DirectRepositoryWriter) contentWriter {
	m := w.ContentManager()
	if !m.SupportsContentCompression() {
		return nil
	}
	return adaptBytes(m.WriteContent)
}

// adaptBytes makes a contentWriter of WriteContent. It returns nil if its type of bytes changes.
func adaptBytes[T any](write func(context.Context, T, content.IDPrefix, compression.HeaderID) (content.ID, error)) contentWriter {
	set := setBytes[T]()
	if set == nil {
		return nil
	}
	return func(ctx context.Context, p []byte, prefix content.IDPrefix, comp compression.HeaderID) (content.ID, error) {
		return write(ctx, set(p), prefix, comp)
	}
}

// setBytes makes bytes of a type that only Kopia can name (gather.Bytes): a struct with the field
// Slices. It returns nil if that changes.
func setBytes[T any]() func([]byte) T {
	t := reflect.TypeFor[T]()
	if t.Kind() != reflect.Struct {
		return nil
	}
	field, ok := t.FieldByName("Slices")
	if !ok || field.Type != reflect.TypeFor[[][]byte]() {
		return nil
	}
	return func(p []byte) T {
		var data T
		*reflect.ValueOf(&data).Elem().FieldByIndex(field.Index).Addr().Interface().(*[][]byte) = [][]byte{p}
		return data
	}
}

// headerOf returns the ID of a compressor, or of none for an empty or unknown name.
func headerOf(name compression.Name) compression.HeaderID {
	if c := compression.ByName[name]; c != nil {
		return c.HeaderID()
	}
	return content.NoCompression
}

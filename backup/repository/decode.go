package repository

import (
	"bytes"
	"context"
	"crypto/aes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
)

// maxDirect bounds a content that is decoded directly, in bytes; Kopia stores none as large.
const maxDirect = 64 << 20

// decodedAtOnce is how many contents are decoded at once for each CPU. More would only take memory, a block and its buffers for
// each request of each client.
const decodedAtOnce = 2

var errNotDirect = errors.New("the content is read by Kopia")

// readContent reads a content as Kopia's GetContent does, but decodes it into the bytes that it returns: Kopia's buffers,
// made for contents of any size, copy a block seven times. Kopia itself reads what is not in a pack yet, what its disk
// cache may have, and what does not decode here, so that errors about a content are its own.
func (r *Repository) readContent(ctx context.Context, cid content.ID) ([]byte, error) {
	if r.uncached {
		p, err := r.decodeContent(ctx, cid)
		if pack := (*packError)(nil); err == nil || errors.As(err, &pack) || ctx.Err() != nil {
			return p, err
		}
	}
	return r.direct.ContentReader().GetContent(ctx, cid)
}

// packError is the storage's: it would answer Kopia in the same way, and perhaps after as long.
type packError struct {
	pack blob.ID
	err  error
}

func (e *packError) Error() string { return fmt.Sprintf("read pack %s: %v", e.pack, e.err) }

func (e *packError) Unwrap() error { return e.err }

func (r *Repository) decodeContent(ctx context.Context, cid content.ID) ([]byte, error) {
	contents := r.direct.ContentReader()
	info, err := contents.ContentInfo(ctx, cid)
	if err != nil {
		return nil, err
	}
	if info.PackBlobID == "" || info.EncryptionKeyID != 0 || info.PackedLength > maxDirect || info.OriginalLength > maxDirect {
		return nil, errNotDirect
	}
	packed := takeBuffer(int(info.PackedLength))
	defer readBuffers.Put(packed)
	if err := r.direct.BlobReader().GetBlob(ctx, info.PackBlobID, int64(info.PackOffset), int64(info.PackedLength), packed); err != nil {
		return nil, &packError{info.PackBlobID, err}
	}
	// The index names a content by its hash, the end of which Kopia authenticates it with
	// (kopia repo/content/content_manager_lock_free.go, getPackedContentIV).
	hash := cid.Hash()
	if len(hash) < aes.BlockSize {
		return nil, errNotDirect
	}
	// The storage was waited for without a place: one file that hangs must not delay the others.
	if err := r.decoding.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	defer r.decoding.Release(1)
	decrypt := func(into io.Writer) error {
		return decryptInto(contents.ContentFormat().Encryptor().Decrypt, packed.p, hash[len(hash)-aes.BlockSize:], into)
	}
	out := &exactBuffer{make([]byte, 0, info.OriginalLength)}
	if info.CompressionHeaderID == content.NoCompression {
		return out.all(decrypt(out))
	}
	plain := takeBuffer(int(info.PackedLength))
	defer readBuffers.Put(plain)
	if err := decrypt(plain); err != nil {
		return nil, err
	}
	return out.all(decompress(info.CompressionHeaderID, plain.p, out))
}

// decryptInto decrypts with Kopia's encryptor, whose types of bytes only Kopia can name (gather.Bytes and
// gather.WriteBuffer).
func decryptInto[In, Out any](decrypt func(In, []byte, *Out) error, packed, id []byte, into io.Writer) error {
	set := setBytes[In]()
	out := new(Out)
	gathered, ok := any(out).(interface {
		AppendSectionTo(w io.Writer, offset, size int) error
		Length() int
		Close()
	})
	if set == nil || !ok {
		return errNotDirect
	}
	defer gathered.Close()
	if err := decrypt(set(packed), id, out); err != nil {
		return err
	}
	return gathered.AppendSectionTo(into, 0, gathered.Length())
}

// readBuffer is a blob.OutputBuffer that reads from a file without a copy between.
type readBuffer struct{ p []byte }

var _ blob.OutputBuffer = (*readBuffer)(nil)

func (b *readBuffer) Write(p []byte) (int, error) { b.p = append(b.p, p...); return len(p), nil }
func (b *readBuffer) Reset()                      { b.p = b.p[:0] }
func (b *readBuffer) Length() int                 { return len(b.p) }

// ReadFrom implements io.ReaderFrom.
func (b *readBuffer) ReadFrom(r io.Reader) (int64, error) {
	before := len(b.p)
	for {
		if len(b.p) == cap(b.p) {
			b.p = append(b.p, 0)[:len(b.p)]
		}
		n, err := r.Read(b.p[len(b.p):cap(b.p)])
		b.p = b.p[:len(b.p)+n]
		switch {
		case errors.Is(err, io.EOF):
			return int64(len(b.p) - before), nil
		case err != nil:
			return int64(len(b.p) - before), err
		}
	}
}

var readBuffers = sync.Pool{New: func() any { return new(readBuffer) }}

// takeBuffer returns an empty buffer with room for n bytes and for the read that finds the end.
func takeBuffer(n int) *readBuffer {
	b := readBuffers.Get().(*readBuffer)
	b.Reset()
	if cap(b.p) <= n {
		b.p = make([]byte, 0, n+n/8+1)
	}
	return b
}

// exactBuffer takes as many bytes as it has room for.
type exactBuffer struct{ p []byte }

func (b *exactBuffer) Write(p []byte) (int, error) {
	if len(p) > cap(b.p)-len(b.p) {
		return 0, fmt.Errorf("more than %d bytes", cap(b.p))
	}
	b.p = append(b.p, p...)
	return len(p), nil
}

// all returns the bytes, once they are all there.
func (b *exactBuffer) all(err error) ([]byte, error) {
	if err == nil && len(b.p) < cap(b.p) {
		err = fmt.Errorf("%d bytes instead of %d", len(b.p), cap(b.p))
	}
	return b.p, err
}

// decompress decodes p, which begins with the ID of its compressor (kopia repo/compression).
func decompress(id compression.HeaderID, p []byte, out *exactBuffer) error {
	if decompressS2(id, p, out) {
		return nil
	}
	c := compression.ByHeaderID[id]
	if c == nil {
		return errNotDirect
	}
	return c.Decompress(out, bytes.NewReader(p), true)
}

// s2Head begins a stream of S2 (Snappy framing format, section 4.1).
const s2Head = "\xff\x06\x00\x00S2sTwO"

var s2Sums = crc32.MakeTable(crc32.Castagnoli)

// decompressS2 decodes a stream of S2 that is one compressed chunk, as that of a block is, in place. It reports
// whether it did; it leaves all other streams, damaged ones too, to Kopia.
func decompressS2(id compression.HeaderID, p []byte, out *exactBuffer) bool {
	if !strings.HasPrefix(string(compression.HeaderIDToName[id]), "s2-") || len(p) < 4 || compression.HeaderID(binary.BigEndian.Uint32(p)) != id {
		return false
	}
	chunk, ok := bytes.CutPrefix(p[4:], []byte(s2Head))
	if !ok || len(chunk) <= 8 || binary.LittleEndian.Uint32(chunk) != uint32(len(chunk)-4)<<8 { // type 0, and the length
		return false
	}
	sum, block := binary.LittleEndian.Uint32(chunk[4:]), chunk[8:]
	n := cap(out.p)
	if size, err := s2.DecodedLen(block); err != nil || size != n {
		return false
	}
	if _, err := s2.Decode(out.p[:n], block); err != nil {
		return false
	}
	if got := crc32.Checksum(out.p[:n], s2Sums); (got>>15|got<<17)+0xa282ead8 != sum { // masked (section 3)
		return false
	}
	out.p = out.p[:n]
	return true
}

package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"

	"github.com/varve-io/varve/internal/bytesize"
)

// ErrCut means that a stream ended without its end mark, or not where that says.
var ErrCut = errors.New("the stream was cut")

// A stream is sent to a mover as frames: the length of each as 4 bytes, most significant first, and that many
// bytes. The last has the length 0, and 8 bytes: the length of the whole. A beat is a length that no frame
// has, with nothing after it: it says that the controller is alive while the command prints nothing.

// maxFrame bounds a frame, in bytes.
const maxFrame = 1 << 20

// beat in place of a length.
const beat = 1 << 31

// Writer writes a stream as frames. It is safe for concurrent use.
type Writer struct {
	w  io.Writer
	mu sync.Mutex
	n  int64
}

// NewWriter writes to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

func (w *Writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	done := 0
	for done < len(p) {
		piece := p[done:min(done+maxFrame, len(p))]
		head := binary.BigEndian.AppendUint32(nil, uint32(len(piece)))
		if _, err := w.w.Write(head); err != nil {
			return done, err
		}
		n, err := w.w.Write(piece)
		done += n
		w.n += int64(n)
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// Bytes returns the number of bytes written.
func (w *Writer) Bytes() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.n
}

// Beat says that the writer is alive. It waits for a running Write.
func (w *Writer) Beat() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.w.Write(binary.BigEndian.AppendUint32(nil, beat))
	return err
}

// End says that this was all.
func (w *Writer) End() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.w.Write(binary.BigEndian.AppendUint64([]byte{0, 0, 0, 0}, uint64(w.n)))
	return err
}

// Reader reads what a Writer wrote. It returns io.EOF only if the stream ended as its Writer said;
// any other end is ErrCut. It is not safe for concurrent use.
type Reader struct {
	r    io.Reader
	left int // of the frame
	n    int64
	err  error
}

// NewReader reads from r.
func NewReader(r io.Reader) *Reader { return &Reader{r: r} }

func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 || r.err != nil {
		return 0, r.err
	}
	if r.left == 0 {
		if r.err = r.next(); r.err != nil {
			return 0, r.err
		}
	}
	n, err := r.r.Read(p[:min(len(p), r.left)])
	r.left -= n
	r.n += int64(n)
	if err != nil && (r.left > 0 || !errors.Is(err, io.EOF)) {
		r.err = r.cut(err)
		return n, r.err
	}
	return n, nil
}

// next reads the head of a frame.
func (r *Reader) next() error {
	n := uint32(beat)
	for n == beat {
		var head [4]byte
		if _, err := io.ReadFull(r.r, head[:]); err != nil {
			return r.cut(err)
		}
		n = binary.BigEndian.Uint32(head[:])
	}
	switch {
	case n > maxFrame:
		return fmt.Errorf("%w: a frame of %s at %d", ErrCut, bytesize.Exact(int64(n)), r.n)
	case n > 0:
		r.left = int(n)
		return nil
	}
	var all [8]byte
	if _, err := io.ReadFull(r.r, all[:]); err != nil {
		return r.cut(err)
	}
	if n := binary.BigEndian.Uint64(all[:]); n != uint64(r.n) {
		return fmt.Errorf("%w: %s came of %s", ErrCut, bytesize.Exact(r.n), bytesize.Exact(int64(min(n, math.MaxInt64))))
	}
	return io.EOF
}

func (r *Reader) cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w at %d", ErrCut, r.n)
	}
	return fmt.Errorf("%w at %d: %w", ErrCut, r.n, err)
}

package stream

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// A stream reads back unchanged, cut into any pieces; one without its end, or with a wrong one,
// does not end with io.EOF.
func TestFrames(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 1))
	var all, framed bytes.Buffer
	w := NewWriter(&framed)
	for range 40 {
		p := make([]byte, rng.IntN(3<<17))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		all.Write(p)
		if n, err := w.Write(p); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
	}
	if err := w.Beat(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, maxFrame+1)
	all.Write(p)
	if _, err := w.Write(p); err != nil || w.Beat() != nil || w.End() != nil || w.Bytes() != int64(all.Len()) {
		t.Fatal(err, w.Bytes())
	}
	whole := framed.Bytes()
	for name, r := range map[string]io.Reader{"at once": bytes.NewReader(whole), "in halves": iotest.HalfReader(bytes.NewReader(whole)), "with the error": iotest.DataErrReader(bytes.NewReader(whole))} {
		got, err := io.ReadAll(NewReader(r))
		if err != nil || !bytes.Equal(got, all.Bytes()) {
			t.Errorf("%s: %d of %d bytes, %v", name, len(got), all.Len(), err)
		}
	}
	for range 200 {
		n := rng.IntN(len(whole))
		got, err := io.ReadAll(NewReader(bytes.NewReader(whole[:n])))
		if !errors.Is(err, ErrCut) || !bytes.HasPrefix(all.Bytes(), got) {
			t.Fatalf("cut at %d: %d bytes, %v", n, len(got), err)
		}
	}
	other := bytes.Clone(whole)
	other[len(other)-1] ^= 1
	if _, err := io.ReadAll(NewReader(bytes.NewReader(other))); !errors.Is(err, ErrCut) {
		t.Errorf("with another end: %v", err)
	}
}

// FuzzReader: a stream that ends with io.EOF is what a Writer writes for as many bytes.
func FuzzReader(f *testing.F) {
	for _, pieces := range [][]string{{}, {"a"}, {"hello", "", "world"}} {
		var b bytes.Buffer
		w := NewWriter(&b)
		for _, p := range pieces {
			_, _ = w.Write([]byte(p))
		}
		_ = w.End()
		f.Add(b.Bytes())
		f.Add(b.Bytes()[:b.Len()-3])
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{0x80, 0, 0, 0, 0, 0, 0, 1, 'x', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, p []byte) {
		got, err := io.ReadAll(NewReader(bytes.NewReader(p)))
		if err != nil {
			if !errors.Is(err, ErrCut) {
				t.Fatal(err)
			}
			return
		}
		if len(got) > len(p) {
			t.Fatalf("%d bytes of %d", len(got), len(p))
		}
		var b bytes.Buffer
		w := NewWriter(&b)
		if _, err := w.Write(got); err != nil || w.End() != nil {
			t.Fatal(err)
		}
		again, err := io.ReadAll(NewReader(&b))
		if err != nil || !bytes.Equal(again, got) {
			t.Fatalf("%q, %v", again, err)
		}
	})
}

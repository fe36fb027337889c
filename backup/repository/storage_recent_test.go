package repository

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/kopia/kopia/repo/blob"
)

func someBlobs(rng *rand.Rand, n int) []namedBlob {
	var out []namedBlob
	for i := range n {
		p := make([]byte, rng.IntN(5000))
		for j := range p {
			p[j] = byte(rng.Uint32())
		}
		out = append(out, namedBlob{blob.ID(fmt.Sprintf("%s%x-s%x-c1", []string{"q", "xn0_", "xs3_", "xr0_4_"}[rng.IntN(4)], rng.Uint64(), i)), p})
	}
	return out
}

func TestRecentEncoding(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(5, 6))
	for n := range 20 {
		want := someBlobs(rng, n)
		p := encodeRecent(want)
		got, err := decodeRecent(p)
		if err != nil || !slices.EqualFunc(got, want, func(a, b namedBlob) bool { return a.id == b.id && bytes.Equal(a.p, b.p) }) {
			t.Fatalf("%d blobs read back different: %v", n, err)
		}
		bad := bytes.Clone(p)
		bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
		if _, err := decodeRecent(bad); !errors.Is(err, errBadRecent) {
			t.Errorf("a flipped bit: %v", err)
		}
		if _, err := decodeRecent(p[:rng.IntN(len(p))]); !errors.Is(err, errBadRecent) {
			t.Errorf("a part: %v", err)
		}
	}
}

func FuzzDecodeRecent(f *testing.F) {
	f.Add([]byte(recentMagic))
	rng := rand.New(rand.NewPCG(7, 8))
	for n := range 3 {
		p := encodeRecent(someBlobs(rng, n))
		f.Add(p[:len(p)-sha256.Size])
	}
	f.Add([]byte(recentMagic + "\x00\x00\x00\x02q1\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, p []byte) {
		// With a valid checksum, so that more than the checksum is tested.
		sum := sha256.Sum256(p)
		all, err := decodeRecent(append(bytes.Clone(p), sum[:]...))
		if err != nil {
			return
		}
		for _, b := range all {
			if !isRecentKind(b.id) || len(b.p) > maxRecentBlob {
				t.Errorf("%s of %d bytes", b.id, len(b.p))
			}
		}
		if again := encodeRecent(all); !bytes.Equal(again[:len(p)], p) {
			t.Error("encodes to other bytes")
		}
	})
}

// TestRecentBlobs checks what is read from memory, for how long, and what is written.
func TestRecentBlobs(t *testing.T) {
	t.Parallel()
	r := newRecentBlobs()
	ctx := t.Context()
	r.keep("q1", []byte("hello"), true)
	r.keep("p1", []byte("a pack of blocks"), true)
	r.keep("q2", make([]byte, maxRecentBlob+1), true)
	for _, c := range []struct {
		id          blob.ID
		off, length int64
		want        string
		ok          bool
	}{
		{"q1", 0, -1, "hello", true}, {"q1", 1, 3, "ell", true}, {"q1", 0, 5, "hello", true}, {"q1", 5, -1, "", true},
		{"q1", 0, 6, "", false}, {"q1", 6, -1, "", false}, {"q1", -1, 1, "", false}, {"p1", 0, -1, "", false}, {"q2", 0, -1, "", false},
	} {
		if p, ok := r.read(ctx, c.id, c.off, c.length); ok != c.ok || string(p) != c.want {
			t.Errorf("%s from %d, %d bytes: %q, %v", c.id, c.off, c.length, p, ok)
		}
	}
	r.forget("q1")
	if _, ok := r.read(ctx, "q1", 0, -1); ok {
		t.Error("a deleted blob is answered from memory")
	}
	// The size is bounded, and the latest stay.
	for i := range 100 {
		r.keep(blob.ID(fmt.Sprintf("xn0_%d", i)), make([]byte, maxRecentBlob), true)
	}
	if r.bytes > 2*maxRecent {
		t.Errorf("%d bytes are held", r.bytes)
	}
	r.keep("xn0_last", []byte("last"), true)
	good := func(blob.ID, []byte) bool { return true }
	p := r.encode(func(id blob.ID) bool { return id != "xn0_99" }, good)
	all, err := decodeRecent(p)
	if err != nil || len(p) > maxRecentBytes || len(all) == 0 || all[len(all)-1].id != "xn0_last" || all[len(all)-2].id != "xn0_98" {
		t.Errorf("%d blobs in %d bytes, %v", len(all), len(p), err)
	}
	r.expire()
	if _, ok := r.read(ctx, "xn0_last", 0, -1); ok {
		t.Error("answered after it expired")
	}
	if q := r.encode(func(id blob.ID) bool { return id != "xn0_99" }, good); !bytes.Equal(p, q) {
		t.Error("what does not answer any more is not written either")
	}
}

// TestRecentLoads reads copies once, and continues without them if they cannot be read.
func TestRecentLoads(t *testing.T) {
	t.Parallel()
	good := encodeRecent([]namedBlob{{"xn0_1", []byte("one")}, {"q2", []byte("two")}})
	for name, c := range map[string]struct {
		p   []byte
		err error
		ok  bool
	}{"good": {good, nil, true}, "damaged": {good[1:], nil, false}, "none": {nil, blob.ErrBlobNotFound, false}} {
		r, fetched := newRecentBlobs(), 0
		r.fetch = func(context.Context) ([]byte, error) { fetched++; return c.p, c.err }
		r.load(t.Context())
		r.load(t.Context())
		if _, ok := r.read(t.Context(), "q2", 0, -1); ok != c.ok || fetched != 1 {
			t.Errorf("%s: answered %v, fetched %d times", name, ok, fetched)
		}
	}
}

// TestRecentReads holds what was read for others only, and for those only if it is proven.
func TestRecentReads(t *testing.T) {
	t.Parallel()
	r := newRecentBlobs()
	for _, id := range []blob.ID{"xn0_good", "xn0_bad", "q1"} {
		r.keep(id, []byte(id), false)
		if _, ok := r.read(t.Context(), id, 0, -1); ok {
			t.Errorf("%s, which was read, is answered from memory", id)
		}
	}
	r.keep("xn0_mine", []byte("mine"), true)
	r.keep("q2", []byte("mine"), true)
	all, err := decodeRecent(r.encode(func(blob.ID) bool { return true }, func(id blob.ID, _ []byte) bool { return id == "xn0_good" }))
	var ids []blob.ID
	for _, b := range all {
		ids = append(ids, b.id)
	}
	if want := []blob.ID{"xn0_good", "xn0_mine", "q2"}; err != nil || !slices.Equal(ids, want) {
		t.Errorf("copies of %v, want %v, %v", ids, want, err)
	}
}

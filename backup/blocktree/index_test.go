package blocktree

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/repository"
)

func objectID(t testing.TB, text string) repository.ObjectID {
	t.Helper()
	oid, err := repository.ParseObjectID(text)
	if err != nil {
		t.Fatal(err)
	}
	return oid
}

func TestIndexRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{1, 2, 3, 512, 1000} {
		var entries []Entry
		start := int64(0)
		for range n {
			e := Entry{Start: start, Length: 1 + rng.Int64N(1<<40)}
			e.Object = objectID(t, fmt.Sprintf("%032x", rng.Uint64()))
			if rng.IntN(2) == 0 {
				e.Gen = 1 + rng.Int64N(1<<50)
				e.Digest, e.HasDigest = rng.Uint64(), true
			}
			start += e.Length
			entries = append(entries, e)
		}
		p := EncodeIndex(entries)
		if !json.Valid(p) {
			t.Fatalf("not JSON: %.200s", p)
		}
		if _, ok := parseCanonical(p); !ok {
			t.Fatalf("the fast parser does not know its own writing: %.200s", p)
		}
		s, err := DecodeIndex(p)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(s.Entries, entries) || s.Len != start {
			t.Fatalf("%d entries came back different", n)
		}
		for i := range entries {
			e := &entries[i]
			for _, off := range []int64{e.Start, e.Start + e.Length - 1} {
				if got := s.Find(off); got != i {
					t.Fatalf("Find(%d) = %d, want %d", off, got, i)
				}
			}
		}
	}
}

func TestDecodeIndexRefuses(t *testing.T) {
	const o = `"o":"000102030405060708090a0b0c0d0e0f"`
	for name, body := range map[string]string{
		"gap":                 `{"l":5,` + o + `},{"s":6,"l":1,` + o + `}`,
		"overlap":             `{"l":5,` + o + `},{"s":4,"l":5,` + o + `}`,
		"first not at 0":      `{"s":1,"l":5,` + o + `}`,
		"negative length":     `{"l":-5,` + o + `}`,
		"zero length":         `{"l":0,` + o + `}`,
		"length too large":    `{"l":1152921504606846977,` + o + `}`,
		"sum too large":       `{"l":1152921504606846976,` + o + `},{"s":1152921504606846976,"l":1,` + o + `}`,
		"number overflows":    `{"l":9223372036854775808,` + o + `}`,
		"negative generation": `{"l":5,` + o + `,"g":-1}`,
		"bad digest":          `{"l":5,` + o + `,"d":"xyz"}`,
		"bad object":          `{"l":5,"o":"zz"}`,
		"no entries":          ``,
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := DecodeIndex([]byte(indexHead + body + indexTail)); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v, want ErrMalformed", err)
			}
		})
	}
	for name, text := range map[string]string{
		"empty": "", "not JSON": "hello", "other stream": `{"stream":"kopia:directory","entries":[]}`,
		"cut short": indexHead + `{"l":5,` + o,
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := DecodeIndex([]byte(text)); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v, want ErrMalformed", err)
			}
		})
	}
}

func TestDecodeIndexOfStockKopia(t *testing.T) {
	// As kopia repo/object/object_writer.go writes it: one line, no "s" at 0.
	p := `{"stream":"kopia:indirect","entries":[{"l":10,"o":"000102030405060708090a0b0c0d0e0f"},{"s":10,"l":3,"o":"Ix000102030405060708090a0b0c0d0e0f"}]}` + "\n"
	s, err := DecodeIndex([]byte(p))
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Entries) != 2 || s.Len != 13 || s.Find(9) != 0 || s.Find(10) != 1 || !s.nested {
		t.Errorf("got %+v", s)
	}
}

// FuzzDecodeIndex holds the fast parser against encoding/json: what it
// accepts, both must read alike, and what decodes must keep the invariants.
func FuzzDecodeIndex(f *testing.F) {
	oid := objectID(f, "000102030405060708090a0b0c0d0e0f")
	f.Add(EncodeIndex([]Entry{{Length: 131072, Object: oid, Gen: 3, Digest: 7, HasDigest: true}, {Start: 131072, Length: 5, Object: oid}}))
	f.Add([]byte(`{"stream":"kopia:indirect","entries":[{"l":1,"o":"Z000102030405060708090a0b0c0d0e0f"}]}`))
	f.Add([]byte(indexHead + `{"s":0,"l":9223372036854775807,"o":"` + oid.String() + `"}` + indexTail))
	f.Fuzz(func(t *testing.T, p []byte) {
		if fast, ok := parseCanonical(p); ok && len(fast) > 0 {
			slow, err := parseJSON(p)
			if err != nil {
				t.Fatalf("fast parser accepts what JSON refuses: %v", err)
			}
			if !reflect.DeepEqual(fast, slow) {
				t.Fatalf("fast %+v\nslow %+v", fast, slow)
			}
		}
		s, err := DecodeIndex(p)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("error is not ErrMalformed: %v", err)
			}
			return
		}
		next := int64(0)
		for i := range s.Entries {
			e := &s.Entries[i]
			if e.Start != next || e.Length <= 0 || s.Find(e.Start) != i || s.Find(e.Start+e.Length-1) != i {
				t.Fatalf("entry %d of %+v", i, s)
			}
			next += e.Length
		}
		if next != s.Len || s.Len > MaxSize {
			t.Fatalf("covers %d of %d", next, s.Len)
		}
		again, err := DecodeIndex(EncodeIndex(s.Entries))
		if err != nil || !reflect.DeepEqual(again.Entries, s.Entries) {
			t.Fatalf("does not survive encoding: %v", err)
		}
	})
}

func FuzzDecodeRecord(f *testing.F) {
	r := Record{ID: strings.Repeat("ab", 16), Generation: 1, Kind: KindFull, Size: 5, BlockSize: MinBlockSize, Root: "00"}
	p, err := r.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p)
	f.Add(bytes.Replace(p, []byte("varve/1.0"), []byte("varve/2.0"), 1))
	f.Fuzz(func(t *testing.T, p []byte) {
		rec, err := DecodeRecord(p)
		if err != nil {
			return
		}
		out, err := rec.Encode()
		if err != nil {
			t.Fatalf("decoded but does not encode: %v", err)
		}
		again, err := DecodeRecord(out)
		if err != nil {
			t.Fatalf("does not survive encoding: %v", err)
		}
		out2, err := again.Encode()
		if err != nil || !bytes.Equal(out, out2) {
			t.Fatalf("encodings differ:\n%s\n%s", out, out2)
		}
	})
}

// TestRecordWithHostileIDs: what is no ID, such as a path, is refused wherever a record has one.
func TestRecordWithHostileIDs(t *testing.T) {
	const good = `{"format":"varve/1.0","id":"a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1","parent":"b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2",` +
		`"lineage":"c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3","generation":2,"kind":"incremental","size":1048576,"blockSize":65536}`
	if _, err := DecodeRecord([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{strings.Repeat("a1", 16), strings.Repeat("b2", 16), strings.Repeat("c3", 16)} {
		for _, hostile := range []string{"../../../../../../../victim/data", strings.Repeat("A", 32), "abc"} {
			if _, err := DecodeRecord([]byte(strings.Replace(good, id, hostile, 1))); err == nil {
				t.Errorf("%q in place of %q is accepted", hostile, id)
			}
		}
	}
}

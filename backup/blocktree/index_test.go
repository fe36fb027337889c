package blocktree

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/plain"
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
		for i := range n {
			e := Entry{Start: start, Length: 1 + rng.Int64N(1<<40)}
			e.Object = objectID(t, fmt.Sprintf("%032x", rng.Uint64()))
			if i > 0 && rng.IntN(2) == 0 { // as holes have
				e.Object = entries[i-1].Object
			}
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
		objects, ok := PieceObjects(p)
		if !ok || !slices.EqualFunc(objects, entries, func(o repository.ObjectID, e Entry) bool { return o == e.Object }) {
			t.Fatalf("%d objects came back different", n)
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

// FuzzDecodeIndex compares the fast parser with encoding/json: they must agree on what the
// fast one accepts, and what decodes must keep the invariants.
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
	r.Group = &Group{ID: r.ID, Name: "shop/vm", Members: []string{"shop/vm-a", "shop/vm-b"}}
	r.Consistency = &Consistency{Level: ApplicationConsistent, Method: "hold", Holds: []Hold{{Name: "postgresql", Duration: 1, Proven: true}}}
	if p, err = r.Encode(); err != nil {
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

// TestRecordWithHostileIDs: an invalid ID, such as a path, is rejected everywhere in a
// record.
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

// TestRecordWithHostileFields: any writer to the repository can write a record. Numbers and
// codes that no Varve writes are rejected, and texts are safe to show.
func TestRecordWithHostileFields(t *testing.T) {
	const good = `{"format":"varve/1.0","id":"a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1","generation":2,"kind":"full",` +
		`"size":1048576,"blockSize":65536,"time":"2026-11-20T10:00:00Z"%s}`
	for _, refused := range []string{
		`"generation":0`, `"generation":-1`, `"generation":9223372036854775807`,
		`"kind":"other"`, `"kind":""`, `"kind":"full\u001b[2J"`,
		`"size":-1`, `"size":9223372036854775807`, `"blockSize":0`, `"blockSize":65537`, `"blockSize":9223372036854775807`,
		`"time":"9999-12-31T23:59:59-12:00"`, `"start":"0000-01-01T00:00:00+14:00"`, `"end":"9999-12-31T23:59:59-12:00"`,
		`"readErrors":[{"offset":-1,"length":1}]`, `"readErrors":[{"offset":0,"length":-1}]`,
		`"readErrors":[{"offset":1048576,"length":1}]`, `"readErrors":[{"offset":1,"length":9223372036854775807}]`,
		`"readErrors":[{"offset":0,"length":9},{"offset":8,"length":1}]`,
		`"claim":{"volumeMode":"../Block"}`, `"claim":{"requestBytes":-1}`, `"claim":{"capacity":-1}`,
		`"parent":"../../x"`, `"lineage":"../../x"`,
		`"group":{}`, `"group":{"id":"../../x","name":"shop/vm","members":["shop/vm-a"]}`,
		group("../../x", "shop/vm-a"), group("shop/vm"), group("shop/vm", "shop/vm-b", "shop/vm-a"), group("shop/vm", "shop/vm-a", "shop/vm-a"),
		group("shop/vm", "shop/../x"), group("shop/vm", "a/b/c"), group("shop/vm", "vm-a"), group("shop/vm\\u001b[2J", "shop/vm-a"),
		group("shop/vm", many(MaxGroupMembers+1)...),
		`"content":"tape"`, `"content":"stream"`, `"content":"stream","blockSize":0,"size":-1`, `"content":"stream","blockSize":0,"size":9223372036854775807`,
		`"content":"stream","blockSize":0,"kind":"incremental"`, `"content":"stream","blockSize":0,"readErrors":[{"offset":0,"length":1}]`,
		`"consistency":{"time":"9999-12-31T23:59:59-12:00"}`, `"consistency":{"holds":[{"durationNs":-1}]}`,
		`"consistency":{"holds":[{"start":"0000-01-01T00:00:00+14:00"}]}`, `"consistency":{"holds":[` + strings.Repeat(`{},`, MaxHolds) + `{}]}`,
	} {
		if _, err := DecodeRecord(fmt.Appendf(nil, good, ","+refused)); err == nil {
			t.Errorf("%s is accepted", refused)
		} else if !plain.Is(err.Error()) || len(err.Error()) > 1000 {
			t.Errorf("%s: error %q", refused, err)
		}
	}

	const bad = `\u001b]0;x\u0007\u202e\n`
	long := strings.Repeat("x", 1<<16)
	var fields strings.Builder
	for _, f := range []string{
		"namespace", "name", "cluster", "root", "zeroBlock", "zeroSegment", "source", "changeID", "snapshotHandle", "volumeHandle",
		"run", "lineageReason", "fileSystem", "toolVersion",
	} {
		fmt.Fprintf(&fields, `,%q:"%s%s"`, f, bad, long)
	}
	fmt.Fprintf(&fields, `,"notes":["%[1]s%[2]s"],"fallbacks":[{"from":"%[1]s","to":"a b","reason":"%[2]s","detail":"%[1]s%[2]s"}],`+
		`"spotCheck":{"limit":"%[1]s%[2]s"},"disk":{"tableID":"%[1]s%[2]s","serial":"%[1]s%[2]s","signatures":[{"type":"%[1]s%[2]s","uuid":"%[1]s%[2]s"}]},`+
		`"notCrashConsistent":true,"consistency":{"level":"crash-consistent","method":"%[1]s","detail":"%[1]s%[2]s","holds":[{"name":"%[1]s%[2]s","target":"%[1]s%[2]s","detail":"%[1]s%[2]s"}]},`+
		`"group":{"id":"a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1","name":"shop/vm","members":["shop/vm-a"],"description":"%[1]s%[2]s"},`+
		`"claim":{"uid":"%[1]s%[2]s","namespaceUID":"%[1]s%[2]s","volumeMode":"Block","storageClass":"%[1]s%[2]s","driver":"%[1]s%[2]s","accessModes":["%[1]s%[2]s"]}`, bad, long)
	rec, err := DecodeRecord(fmt.Appendf(nil, good, fields.String()))
	if err != nil {
		t.Fatal(err)
	}
	texts := 0
	walkStrings(reflect.ValueOf(rec).Elem(), func(s string) {
		texts++
		if !plain.Is(s) || len(s) > maxText {
			t.Errorf("%.60q of %d bytes is left as it was", s, len(s))
		}
	})
	if texts < 30 {
		t.Errorf("only %d texts were looked at", texts)
	}
	for _, code := range []string{rec.Source, rec.Fallbacks[0].From, rec.Fallbacks[0].To, rec.Fallbacks[0].Reason, rec.Consistency.Method} {
		if code != unknownToken {
			t.Errorf("the code %.60q is left as it was", code)
		}
	}
	if rec.Consistency.Level != NotConsistent {
		t.Errorf("a disk that was written to while it was read is %s", rec.Consistency.Level)
	}
	if rec, err := DecodeRecord(fmt.Appendf(nil, good, `,"content":"stream","blockSize":0`)); err != nil || !rec.IsStream() || rec.File() != StreamFile {
		t.Error(rec, err)
	}
	if _, err := DecodeRecord(fmt.Appendf(nil, good, ","+group("shop/vm", many(MaxGroupMembers)...))); err != nil {
		t.Error(err)
	}
}

// group returns the field of a record that names the members of its group.
func group(name string, members ...string) string {
	list, _ := json.Marshal(members)
	return fmt.Sprintf(`"group":{"id":"a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1","name":"%s","members":%s}`, name, list)
}

// many returns names of n volumes, in order.
func many(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("shop/vm-%06d", i))
	}
	return out
}

// walkStrings visits every string of a value, also in fields added later.
func walkStrings(v reflect.Value, visit func(string)) {
	switch v.Kind() {
	case reflect.String:
		visit(v.String())
	case reflect.Pointer:
		if !v.IsNil() {
			walkStrings(v.Elem(), visit)
		}
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range v.NumField() {
			walkStrings(v.Field(i), visit)
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return
		}
		for i := range v.Len() {
			walkStrings(v.Index(i), visit)
		}
	}
}

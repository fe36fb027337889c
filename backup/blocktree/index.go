package blocktree

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"sort"
	"strconv"

	"github.com/varve-io/varve/backup/repository"
)

// Entry is one line of an index: Length bytes that start Start bytes into the
// object the index describes are found in Object.
type Entry struct {
	Start, Length int64
	Object        repository.ObjectID
	Gen           int64  // generation that wrote the block; 0 when unknown or a hole
	Digest        uint64 // xxHash64 of the block's bytes
	HasDigest     bool   // holes, indexes and foreign trees have none
}

// Segment is a decoded index. It is immutable and shared by readers.
type Segment struct {
	Entries []Entry // sorted by Start, without gaps, from 0
	Len     int64   // bytes the entries cover
	fixed   int64   // length of every entry but the last, 0 when they vary
	nested  bool    // at least one entry is itself an index
}

// Find returns the index of the entry that holds byte off, 0 <= off < Len.
func (s *Segment) Find(off int64) int {
	if s.fixed > 0 {
		return int(off / s.fixed)
	}
	return sort.Search(len(s.Entries), func(i int) bool {
		e := &s.Entries[i]
		return off < e.Start+e.Length
	})
}

// MemoryBytes estimates the memory of the decoded index.
func (s *Segment) MemoryBytes() int64 { return 64 + int64(len(s.Entries))*80 }

// An index is Kopia's indirect object (kopia repo/object/indirect.go),
//
//	{"stream":"kopia:indirect","entries":[
//	{"s":0,"l":131072,"o":"2b1c…","g":7,"d":"00c0ffee00c0ffee"},
//	{"s":131072,"l":131072,"o":"9d41…"}
//	]}
//
// with two fields that stock Kopia ignores: g, the generation that wrote the
// block, and d, its digest in hexadecimal. Kopia leaves "s" out where it is 0.
const (
	streamID  = "kopia:indirect"
	indexHead = `{"stream":"` + streamID + `","entries":[` + "\n"
	indexTail = "\n]}\n"
	entrySep  = ",\n"
)

// EncodeIndex writes an index of entries.
func EncodeIndex(entries []Entry) []byte {
	out := make([]byte, 0, len(indexHead)+len(indexTail)+len(entries)*96)
	out = append(out, indexHead...)
	out = appendEntries(out, entries)
	return append(out, indexTail...)
}

func appendEntries(out []byte, entries []Entry) []byte {
	for i := range entries {
		if i > 0 {
			out = append(out, entrySep...)
		}
		out = appendEntry(out, &entries[i])
	}
	return out
}

func appendEntry(out []byte, e *Entry) []byte {
	out = append(out, '{')
	if e.Start != 0 {
		out = append(out, `"s":`...)
		out = strconv.AppendInt(out, e.Start, 10)
		out = append(out, ',')
	}
	out = append(out, `"l":`...)
	out = strconv.AppendInt(out, e.Length, 10)
	out = append(out, `,"o":"`...)
	out = e.Object.Append(out)
	out = append(out, '"')
	if e.Gen != 0 {
		out = append(out, `,"g":`...)
		out = strconv.AppendInt(out, e.Gen, 10)
	}
	if e.HasDigest {
		out = append(out, `,"d":"`...)
		const hex = "0123456789abcdef"
		for shift := 60; shift >= 0; shift -= 4 {
			out = append(out, hex[e.Digest>>uint(shift)&15])
		}
		out = append(out, '"')
	}
	return append(out, '}')
}

// jsonEntry is an entry as JSON, for indexes that stock Kopia wrote.
type jsonEntry struct {
	Start  int64               `json:"s"`
	Length int64               `json:"l"`
	Object repository.ObjectID `json:"o"`
	Gen    int64               `json:"g"`
	Digest string              `json:"d"`
}

// DecodeIndex parses an index and checks that its entries cover the object
// from its first byte on, in order, without gaps or overlaps.
func DecodeIndex(p []byte) (*Segment, error) {
	entries, ok := parseCanonical(p)
	if !ok {
		var err error
		if entries, err = parseJSON(p); err != nil {
			return nil, err
		}
	}
	return newSegment(entries)
}

func parseJSON(p []byte) ([]Entry, error) {
	var doc struct {
		Stream  string      `json:"stream"`
		Entries []jsonEntry `json:"entries"`
	}
	if err := json.Unmarshal(p, &doc); err != nil {
		return nil, fmt.Errorf("%w: index: %w", ErrMalformed, err)
	}
	if doc.Stream != streamID {
		return nil, fmt.Errorf("%w: index stream is %q", ErrMalformed, doc.Stream)
	}
	entries := make([]Entry, len(doc.Entries))
	for i, je := range doc.Entries {
		e := Entry{Start: je.Start, Length: je.Length, Object: je.Object, Gen: je.Gen}
		if je.Digest != "" {
			d, err := strconv.ParseUint(je.Digest, 16, 64)
			if err != nil {
				return nil, fmt.Errorf("%w: index entry %d: digest %q", ErrMalformed, i, je.Digest)
			}
			e.Digest, e.HasDigest = d, true
		}
		entries[i] = e
	}
	return entries, nil
}

func newSegment(entries []Entry) (*Segment, error) {
	if len(entries) == 0 {
		return nil, fmt.Errorf("%w: index without entries", ErrMalformed)
	}
	s := &Segment{Entries: entries, fixed: entries[0].Length}
	for i := range entries {
		e := &entries[i]
		if e.Start != s.Len {
			return nil, fmt.Errorf("%w: index entry %d starts at %d, not %d", ErrMalformed, i, e.Start, s.Len)
		}
		if e.Length <= 0 || e.Length > MaxSize-s.Len {
			return nil, fmt.Errorf("%w: index entry %d is %d bytes long", ErrMalformed, i, e.Length)
		}
		if e.Gen < 0 {
			return nil, fmt.Errorf("%w: index entry %d has generation %d", ErrMalformed, i, e.Gen)
		}
		if _, indirect := repository.IsIndirect(e.Object); indirect {
			s.nested = true
		}
		last := i == len(entries)-1
		if e.Length > s.fixed || (e.Length < s.fixed && !last) {
			s.fixed = 0
		}
		s.Len += e.Length
	}
	return s, nil
}

// parseCanonical reads what EncodeIndex writes, several times faster than
// encoding/json; ok is false for anything else.
func parseCanonical(p []byte) (entries []Entry, ok bool) {
	p, ok = bytes.CutPrefix(p, []byte(indexHead))
	if !ok {
		return nil, false
	}
	p, ok = bytes.CutSuffix(p, []byte(indexTail))
	if !ok {
		return nil, false
	}
	return parseEntries(p)
}

// parseEntries reads canonical entries that follow one another.
func parseEntries(p []byte) (entries []Entry, ok bool) {
	entries = make([]Entry, 0, len(p)/64+1)
	if !eachEntry(p, func(e *Entry) { entries = append(entries, *e) }) {
		return nil, false
	}
	return entries, true
}

// eachEntry calls do with canonical entries that follow one another; the entry is valid
// during the call. ok is false, maybe after some calls, if they are not canonical.
func eachEntry(p []byte, do func(*Entry)) (ok bool) {
	var last objectText
	var e Entry
	for first := true; len(p) > 0; first = false {
		if !first {
			if p, ok = cut(p, entrySep); !ok {
				return false
			}
		}
		e = Entry{}
		if p, ok = parseEntry(p, &e, &last); !ok {
			return false
		}
		do(&e)
	}
	return true
}

// objectText is the object parsed last: a segment with holes names one again and again.
type objectText struct {
	text   []byte
	object repository.ObjectID
}

func (t *objectText) parse(p []byte) (repository.ObjectID, bool) {
	if len(p) > 0 && bytes.Equal(p, t.text) {
		return t.object, true
	}
	oid, err := repository.ParseObjectID(string(p))
	if err != nil {
		return oid, false
	}
	t.text, t.object = p, oid
	return oid, true
}

func parseEntry(p []byte, e *Entry, last *objectText) (rest []byte, ok bool) {
	if p, ok = cut(p, "{"); !ok {
		return nil, false
	}
	if q, has := cut(p, `"s":`); has {
		if e.Start, p, ok = cutInt(q); !ok {
			return nil, false
		}
		if p, ok = cut(p, ","); !ok {
			return nil, false
		}
	}
	if p, ok = cut(p, `"l":`); !ok {
		return nil, false
	}
	if e.Length, p, ok = cutInt(p); !ok {
		return nil, false
	}
	if p, ok = cut(p, `,"o":"`); !ok {
		return nil, false
	}
	end := bytes.IndexByte(p, '"')
	if end < 0 {
		return nil, false
	}
	if e.Object, ok = last.parse(p[:end]); !ok {
		return nil, false
	}
	p = p[end+1:]
	if q, has := cut(p, `,"g":`); has {
		if e.Gen, p, ok = cutInt(q); !ok {
			return nil, false
		}
	}
	if q, has := cut(p, `,"d":"`); has {
		if len(q) < 17 || q[16] != '"' {
			return nil, false
		}
		d, err := strconv.ParseUint(string(q[:16]), 16, 64)
		if err != nil {
			return nil, false
		}
		e.Digest, e.HasDigest, p = d, true, q[17:]
	}
	return cut(p, "}")
}

func cut(p []byte, prefix string) ([]byte, bool) {
	if len(p) < len(prefix) || string(p[:len(prefix)]) != prefix {
		return p, false
	}
	return p[len(prefix):], true
}

// cutInt reads a non-negative decimal below 2^63.
func cutInt(p []byte) (n int64, rest []byte, ok bool) {
	i := 0
	for i < len(p) && p[i] >= '0' && p[i] <= '9' {
		digit := int64(p[i] - '0')
		if n > (math.MaxInt64-digit)/10 {
			return 0, nil, false
		}
		n = n*10 + digit
		i++
	}
	if i == 0 || (p[0] == '0' && i > 1) {
		return 0, nil, false
	}
	return n, p[i:], true
}

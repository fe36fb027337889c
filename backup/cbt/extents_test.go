package cbt_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
)

func TestExtentsConforms(t *testing.T) {
	leftOut := map[string]string{}
	for _, rule := range []string{
		"FixedLength", "FixedLengthShortTail", "BrokenAtOnce", "BrokenOften", "Straddling", "Repeating",
		"EndsEarly", "EndsEarlyAtOnce", "EndsEarlyThenBreaks",
	} {
		leftOut[rule] = "a list in a file is told once and as it stands: there is nothing to go on from"
	}

	cbttest.All(t, leftOut, func(t *testing.T, l cbttest.Listing) cbt.Source {
		var list bytes.Buffer

		w, err := cbt.NewExtentsWriter(&list, cbt.ExtentsHeader{Base: l.Base, Target: l.Target, Size: l.Size, Volume: l.Volume})
		if err != nil {
			t.Fatal(err)
		}

		for _, e := range l.Extents {
			if err := w.Add(e); err != nil {
				t.Fatal(err)
			}
		}

		if err := w.Close(); err != nil {
			t.Fatal(err)
		}

		if l.CutAfter >= 0 {
			lines := bytes.SplitAfter(list.Bytes(), []byte("\n"))
			list = *bytes.NewBuffer(bytes.Join(lines[:1+l.CutAfter], nil))
		}
		return cbt.NewExtents(iotest.HalfReader(&list))
	})
}

const (
	goodHeader = `{"format":"varve-extents/1","base":"b","target":"t","size":1000}` + "\n"
	goodEnd    = `{"end":true,"count":1}` + "\n"
	goodExtent = `{"offset":0,"length":10}` + "\n"
)

func list(t *testing.T, text string) ([]cbt.Extent, cbt.Report, error) {
	t.Helper()

	var got []cbt.Extent

	report, err := cbt.NewExtents(strings.NewReader(text)).Changes(t.Context(),
		cbt.Request{Base: &cbt.Base{PointID: "p", ChangeID: "b", VolumeHandle: "v", Size: 1000}, Size: 1000},
		func(e cbt.Extent) error {
			got = append(got, e)
			return nil
		})
	return got, report, err
}

func TestExtentsAccepted(t *testing.T) {
	for name, text := range map[string]string{
		"plain":                goodHeader + goodExtent + goodEnd,
		"no final newline":     goodHeader + goodExtent + strings.TrimSpace(goodEnd),
		"CRLF, blanks, spaces": strings.ReplaceAll(goodHeader+"\n { \"length\" : 10 , \"offset\" : 0 } \n\n"+goodEnd+"\n", "\n", "\r\n"),
		"no format":            `{"base":"b","target":"t","size":1000}` + "\n" + goodExtent + goodEnd,
		"fields of the writer": `{"base":"b","target":"t","size":1000,"made-by":{"x":[1]}}` + "\n" + goodExtent + goodEnd,
		"no trailer":           `{"base":"b","target":"t","size":1000,"trailer":false}` + "\n" + goodExtent,
		"no trailer, cut line": `{"base":"b","target":"t","size":1000,"trailer":false}` + "\n" + strings.TrimSpace(goodExtent),
		"needless trailer":     `{"base":"b","target":"t","size":1000,"trailer":false}` + "\n" + goodExtent + goodEnd,
		"explicit not zero":    goodHeader + `{"offset":0,"length":10,"zero":false}` + "\n" + goodEnd,
		"same volume":          `{"base":"b","target":"t","size":1000,"volume":"v"}` + "\n" + goodExtent + goodEnd,
	} {
		t.Run(name, func(t *testing.T) {
			got, report, err := list(t, text)
			if err != nil {
				t.Fatal(err)
			}

			if len(got) != 1 || got[0] != (cbt.Extent{Length: 10}) {
				t.Errorf("extents %v", got)
			}

			want := cbt.Report{Source: "extents", BaseChangeID: "b", TargetChangeID: "t", VolumeHandle: "v", Size: 1000, Exact: true, Reported: 10}
			if report != want {
				t.Errorf("report %+v, want %+v", report, want)
			}
		})
	}
}

func TestExtentsRefused(t *testing.T) {
	long := strings.Repeat("x", 70_000)

	for name, c := range map[string]struct {
		text string
		kind error
		line int64
	}{
		"nothing":                {"", cbt.ErrTruncated, 0},
		"only blanks":            {"\n\n  \n", cbt.ErrTruncated, 0},
		"no trailer":             {goodHeader + goodExtent, cbt.ErrTruncated, 2},
		"only a header":          {goodHeader, cbt.ErrTruncated, 1},
		"cut header":             {goodHeader[:30], cbt.ErrTruncated, 1},
		"cut extent":             {goodHeader + goodExtent + goodExtent[:12], cbt.ErrTruncated, 3},
		"cut in a number":        {goodHeader + goodExtent + `{"offset":40,"length":1`, cbt.ErrTruncated, 3},
		"cut trailer":            {goodHeader + goodExtent + goodEnd[:9], cbt.ErrTruncated, 3},
		"fewer than counted":     {goodHeader + goodEnd, cbt.ErrTruncated, 2},
		"more than counted":      {goodHeader + goodExtent + `{"end":true,"count":0}` + "\n", cbt.ErrTruncated, 3},
		"cut without trailer":    {`{"base":"b","target":"t","size":1000,"trailer":false}` + "\n" + `{"offset":0,"len`, cbt.ErrTruncated, 2},
		"something behind":       {goodHeader + goodExtent + goodEnd + goodHeader, cbt.ErrFormat, 4},
		"no header":              {goodExtent + goodEnd, cbt.ErrFormat, 1},
		"header no JSON":         {"offset,length\n", cbt.ErrFormat, 1},
		"no base":                {`{"target":"t","size":1000}` + "\n", cbt.ErrFormat, 1},
		"empty base":             {`{"base":"","target":"t","size":1000}` + "\n", cbt.ErrFormat, 1},
		"base a number":          {`{"base":7,"target":"t","size":1000}` + "\n", cbt.ErrFormat, 1},
		"no target":              {`{"base":"b","size":1000}` + "\n", cbt.ErrFormat, 1},
		"no size":                {`{"base":"b","target":"t"}` + "\n", cbt.ErrFormat, 1},
		"negative size":          {`{"base":"b","target":"t","size":-1}` + "\n", cbt.ErrFormat, 1},
		"size overflows":         {`{"base":"b","target":"t","size":9223372036854775808}` + "\n", cbt.ErrFormat, 1},
		"other format":           {`{"format":"varve-extents/2","base":"b","target":"t","size":1000}` + "\n", cbt.ErrFormat, 1},
		"base in capitals":       {`{"BASE":"b","target":"t","size":1000}` + "\n", cbt.ErrFormat, 1},
		"base in both cases":     {`{"base":"b","Base":"c","target":"t","size":1000}` + "\n", cbt.ErrFormat, 1},
		"base twice":             {`{"base":"c","base":"b","target":"t","size":1000}` + "\n", cbt.ErrFormat, 1},
		"target is base":         {`{"base":"b","target":"b","size":1000}` + "\n", cbt.ErrFormat, 1},
		"minus zero":             {goodHeader + `{"offset":-0,"length":1}` + "\n" + goodEnd, cbt.ErrFormat, 2},
		"byte order mark":        {"\xef\xbb\xbf" + goodHeader + goodExtent + goodEnd, cbt.ErrFormat, 1},
		"UTF-16":                 {"\xff\xfe{\x00\n\x00", cbt.ErrFormat, 1},
		"table of rbd diff":      {"Offset  Length   Type\n0       4194304  data\n", cbt.ErrFormat, 1},
		"table of nbdinfo":       {"0       4194304  0  data\n", cbt.ErrFormat, 1},
		"long header":            {`{"base":"` + long + `"}` + "\n", cbt.ErrFormat, 1},
		"long line":              {goodHeader + `{"offset":` + long + "\n", cbt.ErrFormat, 2},
		"garbage":                {goodHeader + goodExtent + "garbage\n" + goodEnd, cbt.ErrFormat, 3},
		"two on a line":          {goodHeader + `{"offset":0,"length":1}{"offset":1,"length":1}` + "\n", cbt.ErrFormat, 2},
		"array":                  {goodHeader + "[0,10]\n", cbt.ErrFormat, 2},
		"empty object":           {goodHeader + "{}\n", cbt.ErrFormat, 2},
		"no length":              {goodHeader + `{"offset":0}` + "\n", cbt.ErrFormat, 2},
		"no offset":              {goodHeader + `{"length":1}` + "\n", cbt.ErrFormat, 2},
		"other case":             {goodHeader + `{"Offset":0,"length":1}` + "\n", cbt.ErrFormat, 2},
		"twice":                  {goodHeader + `{"offset":0,"offset":1,"length":1}` + "\n", cbt.ErrFormat, 2},
		"unknown field":          {goodHeader + `{"offset":0,"length":1,"zeros":true}` + "\n", cbt.ErrFormat, 2},
		"fraction":               {goodHeader + `{"offset":0.5,"length":1}` + "\n", cbt.ErrFormat, 2},
		"exponent":               {goodHeader + `{"offset":1e3,"length":1}` + "\n", cbt.ErrFormat, 2},
		"octal":                  {goodHeader + `{"offset":010,"length":1}` + "\n", cbt.ErrFormat, 2},
		"number as text":         {goodHeader + `{"offset":"0","length":1}` + "\n", cbt.ErrFormat, 2},
		"number overflows":       {goodHeader + `{"offset":9223372036854775808,"length":1}` + "\n", cbt.ErrFormat, 2},
		"zero a number":          {goodHeader + `{"offset":0,"length":1,"zero":1}` + "\n", cbt.ErrFormat, 2},
		"end false":              {goodHeader + `{"end":false,"count":0}` + "\n", cbt.ErrFormat, 2},
		"end without count":      {goodHeader + `{"end":true}` + "\n", cbt.ErrFormat, 2},
		"end with offset":        {goodHeader + `{"end":true,"count":0,"offset":0}` + "\n", cbt.ErrFormat, 2},
		"trailing comma":         {goodHeader + `{"offset":0,"length":1,}` + "\n", cbt.ErrFormat, 2},
		"other base":             {`{"base":"x","target":"t","size":1000}` + "\n", cbt.ErrBaseMismatch, 1},
		"allocated, not changed": {`{"base":null,"target":"t","size":1000}` + "\n", cbt.ErrBaseMismatch, 1},
		"other size":             {`{"base":"b","target":"t","size":1001}` + "\n", cbt.ErrSizeMismatch, 1},
		"other volume":           {`{"base":"b","target":"t","size":1000,"volume":"w"}` + "\n", cbt.ErrVolumeMismatch, 1},
		"overlap in order":       {goodHeader + goodExtent + `{"offset":9,"length":2}` + "\n" + `{"end":true,"count":2}`, cbt.ErrOverlap, 3},
		"sum beyond the disk":    {goodHeader + `{"offset":0,"length":1000}` + "\n" + goodExtent + goodEnd, cbt.ErrOverlap, 3},
		"beyond the end":         {goodHeader + `{"offset":999,"length":2}` + "\n", cbt.ErrOutOfRange, 2},
		"end overflows":          {goodHeader + `{"offset":1000,"length":9223372036854775807}` + "\n", cbt.ErrOutOfRange, 2},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := list(t, c.text)

			var detailed *cbt.Error
			if !errors.Is(err, c.kind) || !errors.As(err, &detailed) {
				t.Fatalf("Changes = %v, want %v", err, c.kind)
			}

			if detailed.Line != c.line {
				t.Errorf("line %d, want %d: %v", detailed.Line, c.line, err)
			}

			if len(err.Error()) > 600 {
				t.Errorf("the message has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestExtentsIsReadOnce(t *testing.T) {
	source := cbt.NewExtents(strings.NewReader(goodHeader + goodExtent + goodEnd))
	request := cbt.Request{Base: &cbt.Base{ChangeID: "b"}, Size: 1000}
	nothing := func(cbt.Extent) error { return nil }

	if _, err := source.Changes(t.Context(), request, nothing); err != nil {
		t.Fatal(err)
	}

	if _, err := source.Changes(t.Context(), request, nothing); !errors.Is(err, cbt.ErrConsumed) {
		t.Errorf("second Changes = %v, want %v", err, cbt.ErrConsumed)
	}
}

func TestExtentsReadError(t *testing.T) {
	broken := errors.New("pipe broke")
	source := cbt.NewExtents(io.MultiReader(strings.NewReader(goodHeader+goodExtent), iotest.ErrReader(broken)))

	_, err := source.Changes(t.Context(), cbt.Request{Base: &cbt.Base{ChangeID: "b"}, Size: 1000}, func(cbt.Extent) error { return nil })
	if !errors.Is(err, broken) || !errors.Is(err, cbt.ErrTruncated) {
		t.Errorf("Changes = %v, want %v and %v", err, broken, cbt.ErrTruncated)
	}
}

func TestExtentsWriterNeedsATarget(t *testing.T) {
	if _, err := cbt.NewExtentsWriter(io.Discard, cbt.ExtentsHeader{Base: "b", Size: 1}); err == nil {
		t.Error("a header without a target was written")
	}
}

// FuzzExtents compares the line parser with encoding/json, and checks the listing's promises.
func FuzzExtents(f *testing.F) {
	f.Add([]byte(goodHeader + goodExtent + goodEnd))
	f.Add([]byte(goodHeader + `{"offset":500,"length":500,"zero":true}` + "\n" + goodExtent + `{"end":true,"count":2}`))
	f.Add([]byte(`{"base":null,"target":"t","size":1000,"trailer":false}`))
	f.Add([]byte(goodHeader + `{"offset":-0,"length":1}` + "\n" + goodEnd))

	f.Fuzz(func(t *testing.T, text []byte) {
		for _, base := range []*cbt.Base{nil, {ChangeID: "b"}} {
			var (
				covered [1000]bool
				got     []cbt.Extent
				sum     int64
			)

			report, err := cbt.NewExtents(bytes.NewReader(text)).Changes(t.Context(), cbt.Request{Base: base, Size: 1000},
				func(e cbt.Extent) error {
					got = append(got, e)
					return nil
				})
			if err != nil {
				var detailed *cbt.Error
				if !errors.As(err, &detailed) {
					t.Fatalf("%v is not a *cbt.Error", err)
				}

				continue
			}

			for _, e := range got {
				if e.Length <= 0 || e.Offset < 0 || e.Offset+e.Length > 1000 {
					t.Fatalf("extent %v", e)
				}

				sum += e.Length
				for i := e.Offset; i < e.End(); i++ {
					if covered[i] {
						t.Fatalf("byte %d twice", i)
					}
					covered[i] = true
				}
			}

			if report.Reported != sum {
				t.Fatalf("Reported %d, want %d", report.Reported, sum)
			}

			if want := decode(t, text); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("extents %v, encoding/json reads %v", got, want)
			}
		}
	})
}

// decode reads the extents of an accepted list with encoding/json.
func decode(t *testing.T, text []byte) []cbt.Extent {
	var extents []cbt.Extent

	decoder := json.NewDecoder(bytes.NewReader(text))
	for first := true; ; first = false {
		var line struct {
			Offset, Length int64
			Zero, End      bool
		}

		if first {
			var header json.RawMessage
			if err := decoder.Decode(&header); err != nil {
				t.Fatalf("accepted, but the header: %v", err)
			}

			continue
		}

		if err := decoder.Decode(&line); errors.Is(err, io.EOF) {
			return extents
		} else if err != nil {
			t.Fatalf("accepted, but encoding/json: %v", err)
		}

		if !line.End {
			extents = append(extents, cbt.Extent{Offset: line.Offset, Length: line.Length, Zero: line.Zero})
		}
	}
}

func BenchmarkExtents(b *testing.B) {
	const n = 100_000

	var text bytes.Buffer

	w, err := cbt.NewExtentsWriter(&text, cbt.ExtentsHeader{Base: "b", Target: "t", Size: 2 * n << 20})
	if err != nil {
		b.Fatal(err)
	}

	for i := range int64(n) {
		if err := w.Add(cbt.Extent{Offset: 2 * i << 20, Length: 1 << 20}); err != nil {
			b.Fatal(err)
		}
	}

	if err := w.Close(); err != nil {
		b.Fatal(err)
	}

	b.SetBytes(int64(text.Len()))
	b.ReportAllocs()

	for b.Loop() {
		_, err := cbt.NewExtents(bytes.NewReader(text.Bytes())).Changes(b.Context(),
			cbt.Request{Base: &cbt.Base{ChangeID: "b"}, Size: 2 * n << 20}, func(cbt.Extent) error { return nil })
		if err != nil {
			b.Fatal(err)
		}
	}
}

package csi

import (
	"encoding/binary"
	"errors"
	"math"
	"testing"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"

	"github.com/varve-io/varve/backup/cbt"
)

const (
	fixed    = api.BlockMetadataType_FIXED_LENGTH
	variable = api.BlockMetadataType_VARIABLE_LENGTH
)

type testMessage struct {
	kind     api.BlockMetadataType
	capacity int64
	ranges   [][2]int64 // offset, length
}

func (m testMessage) blocks() []*api.BlockMetadata {
	var out []*api.BlockMetadata
	for _, r := range m.ranges {
		out = append(out, &api.BlockMetadata{ByteOffset: r[0], SizeBytes: r[1]})
	}
	return out
}

// merged returns the merged list of a disk of size bytes after calls, each of some messages.
func merged(size int64, calls ...[]testMessage) ([]cbt.Extent, error) {
	var got []cbt.Extent

	m := newMerge("test", size, func(e cbt.Extent) error {
		got = append(got, e)
		return nil
	})

	for _, call := range calls {
		m.begin()

		for _, message := range call {
			if err := m.add(message.kind, message.capacity, message.blocks()); err != nil {
				return got, err
			}
		}
	}
	return got, m.finish()
}

func TestMergeAccepts(t *testing.T) {
	type calls = [][]testMessage

	for name, c := range map[string]struct {
		size  int64
		calls calls
		want  []cbt.Extent
	}{
		"nothing":              {100, calls{{}}, nil},
		"no ranges":            {100, calls{{{variable, 100, nil}}}, nil},
		"a range":              {100, calls{{{variable, 100, [][2]int64{{3, 4}}}}}, []cbt.Extent{{Offset: 3, Length: 4}}},
		"touching ranges":      {100, calls{{{variable, 100, [][2]int64{{3, 4}, {7, 1}}}}}, []cbt.Extent{{Offset: 3, Length: 4}, {Offset: 7, Length: 1}}},
		"the whole":            {100, calls{{{variable, 100, [][2]int64{{0, 100}}}}}, []cbt.Extent{{Length: 100}}},
		"straddles":            {100, calls{{{variable, 100, [][2]int64{{0, 10}}}}, {{variable, 100, [][2]int64{{5, 10}}}}}, []cbt.Extent{{Length: 10}, {Offset: 10, Length: 5}}},
		"straddles all":        {100, calls{{{variable, 100, [][2]int64{{0, 10}}}}, {{variable, 100, [][2]int64{{0, 20}}}}}, []cbt.Extent{{Length: 10}, {Offset: 10, Length: 10}}},
		"repeats":              {100, calls{{{variable, 100, [][2]int64{{0, 5}, {5, 5}}}}, {{variable, 100, [][2]int64{{0, 5}, {5, 5}, {20, 1}}}}}, []cbt.Extent{{Length: 5}, {Offset: 5, Length: 5}, {Offset: 20, Length: 1}}},
		"fixed":                {100, calls{{{fixed, 100, [][2]int64{{0, 32}, {64, 32}}}}}, []cbt.Extent{{Length: 32}, {Offset: 64, Length: 32}}},
		"fixed, short tail":    {100, calls{{{fixed, 100, [][2]int64{{0, 32}, {96, 4}}}}}, []cbt.Extent{{Length: 32}, {Offset: 96, Length: 4}}},
		"fixed, hanging tail":  {100, calls{{{fixed, 100, [][2]int64{{0, 32}, {96, 32}}}}}, []cbt.Extent{{Length: 32}, {Offset: 96, Length: 4}}},
		"fixed, small disk":    {100, calls{{{fixed, 100, [][2]int64{{0, 128}}}}}, []cbt.Extent{{Length: 100}}},
		"fixed, cut on resume": {100, calls{{{fixed, 100, [][2]int64{{0, 32}}}}, {{fixed, 100, [][2]int64{{40, 24}, {64, 32}}}}}, []cbt.Extent{{Length: 32}, {Offset: 40, Length: 24}, {Offset: 64, Length: 32}}},
		"disk is larger":       {100, calls{{{variable, 90, [][2]int64{{0, 1}}}}}, []cbt.Extent{{Length: 1}, {Offset: 90, Length: 10}}},
		"disk is unknown":      {anySize, calls{{{variable, 90, [][2]int64{{0, 1}}}}}, []cbt.Extent{{Length: 1}}},
		"largest disk":         {math.MaxInt64 - 1, calls{{{variable, math.MaxInt64 - 1, [][2]int64{{math.MaxInt64 - 2, 1}}}}}, []cbt.Extent{{Offset: math.MaxInt64 - 2, Length: 1}}},
		"empty disk":           {0, calls{{{variable, 0, nil}}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := merged(c.size, c.calls...)
			if err != nil {
				t.Fatal(err)
			}

			if len(got) != len(c.want) {
				t.Fatalf("got %v, want %v", got, c.want)
			}

			for i := range got {
				if got[i] != c.want[i] {
					t.Fatalf("got %v, want %v", got, c.want)
				}
			}
		})
	}
}

func TestMergeRefuses(t *testing.T) {
	type messages = []testMessage

	for name, c := range map[string]struct {
		messages messages
		kind     error
	}{
		"unknown type":             {messages{{0, 100, nil}}, cbt.ErrFormat},
		"type 9":                   {messages{{9, 100, nil}}, cbt.ErrFormat},
		"type changes":             {messages{{variable, 100, nil}, {fixed, 100, nil}}, cbt.ErrFormat},
		"capacity changes":         {messages{{variable, 100, nil}, {variable, 99, nil}}, cbt.ErrFormat},
		"no capacity":              {messages{{variable, 0, nil}}, cbt.ErrFormat},
		"negative capacity":        {messages{{variable, -1, nil}}, cbt.ErrFormat},
		"capacity above the disk":  {messages{{variable, 101, nil}}, cbt.ErrSizeMismatch},
		"empty":                    {messages{{variable, 100, [][2]int64{{3, 0}}}}, cbt.ErrOutOfRange},
		"negative length":          {messages{{variable, 100, [][2]int64{{3, -1}}}}, cbt.ErrOutOfRange},
		"negative offset":          {messages{{variable, 100, [][2]int64{{-3, 4}}}}, cbt.ErrOutOfRange},
		"behind":                   {messages{{variable, 100, [][2]int64{{100, 1}}}}, cbt.ErrOutOfRange},
		"over the end":             {messages{{variable, 100, [][2]int64{{99, 2}}}}, cbt.ErrOutOfRange},
		"overflow":                 {messages{{variable, 100, [][2]int64{{99, math.MaxInt64}}}}, cbt.ErrOutOfRange},
		"backwards":                {messages{{variable, 100, [][2]int64{{50, 1}, {3, 1}}}}, cbt.ErrOverlap},
		"twice":                    {messages{{variable, 100, [][2]int64{{3, 1}, {3, 1}}}}, cbt.ErrOverlap},
		"overlap":                  {messages{{variable, 100, [][2]int64{{3, 4}, {6, 4}}}}, cbt.ErrOverlap},
		"overlap between messages": {messages{{variable, 100, [][2]int64{{3, 4}}}, {variable, 100, [][2]int64{{6, 4}}}}, cbt.ErrOverlap},
		"fixed changes":            {messages{{fixed, 100, [][2]int64{{0, 10}, {10, 11}}}}, cbt.ErrFormat},
		"fixed shrinks":            {messages{{fixed, 100, [][2]int64{{0, 10}, {10, 9}}}}, cbt.ErrFormat},
		"fixed overflow":           {messages{{fixed, 100, [][2]int64{{0, 10}, {90, math.MaxInt64}}}}, cbt.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := merged(100, c.messages)
			if !errors.Is(err, c.kind) {
				t.Fatalf("%v, want %v", err, c.kind)
			}

			want := cbt.ReasonMalformed
			if c.kind == cbt.ErrSizeMismatch {
				want = cbt.ReasonSizeMismatch
			}

			if reason, _ := cbt.FallbackReason(err); reason != want {
				t.Errorf("reason %q, want %q", reason, want)
			}
		})
	}
}

// FuzzMerge makes calls and messages from bytes, and compares the result with a plain array:
// ascending, within the disk, each byte once, and of the ranges of accepted messages all that
// is after what was listed before.
func FuzzMerge(f *testing.F) {
	message := func(kind, call byte, capacity uint16, ranges ...uint16) []byte {
		b := []byte{kind, call, byte(len(ranges) / 2)}
		b = binary.BigEndian.AppendUint16(b, capacity)
		for _, r := range ranges {
			b = binary.BigEndian.AppendUint16(b, r)
		}
		return b
	}

	f.Add(uint16(1000), message(2, 0, 1000, 0, 10, 20, 30))
	f.Add(uint16(1000), append(message(2, 0, 1000, 0, 10), message(2, 1, 1000, 5, 10, 20, 980)...))
	f.Add(uint16(1000), append(message(1, 0, 900, 0, 64, 128, 64), message(1, 1, 900, 130, 62, 896, 64)...))

	f.Fuzz(func(t *testing.T, size uint16, data []byte) {
		var (
			told = make([]bool, int(size))
			want = make([]bool, int(size))
			end  int64
			sum  int64
		)

		m := newMerge("fuzz", int64(size), func(e cbt.Extent) error {
			if e.Offset < end || e.Length <= 0 || e.Offset > int64(size) || e.Length > int64(size)-e.Offset {
				t.Fatalf("%v after %d, of a disk of %d bytes", e, end, size)
			}

			end = e.End()
			sum += e.Length

			for i := e.Offset; i < end; i++ {
				told[i] = true
			}
			return nil
		})
		m.begin()

		for len(data) >= 5 {
			kind, capacity, count := api.BlockMetadataType(int8(data[0])), int64(int16(binary.BigEndian.Uint16(data[3:]))), int(data[2])
			if data[1]&1 != 0 {
				m.begin()
			}

			huge := data[1]&2 != 0
			data = data[5:]

			var ranges []*api.BlockMetadata
			for ; count > 0 && len(data) >= 4; count-- {
				r := &api.BlockMetadata{ByteOffset: int64(int16(binary.BigEndian.Uint16(data))), SizeBytes: int64(int16(binary.BigEndian.Uint16(data[2:])))}
				if huge {
					r.SizeBytes = math.MaxInt64 - r.SizeBytes
				}

				ranges = append(ranges, r)
				data = data[4:]
			}

			before := m.end
			if m.add(kind, capacity, ranges) != nil {
				return
			}

			for _, r := range ranges {
				for i := max(r.GetByteOffset(), before); i < r.GetByteOffset()+min(r.GetSizeBytes(), capacity-r.GetByteOffset()); i++ {
					want[i] = true
				}
			}
		}

		if m.finish() != nil {
			t.Fatal("finish failed")
		}

		if m.capacity >= 0 {
			for i := m.capacity; i < int64(size); i++ {
				want[i] = true
			}
		}

		for i := range told {
			if told[i] != want[i] {
				t.Fatalf("byte %d: told %v, want %v", i, told[i], want[i])
			}
		}

		if sum != m.reported {
			t.Fatalf("reported %d, told %d", m.reported, sum)
		}
	})
}

// Package extsort sorts records in bounded memory: what does not fit is written, sorted piece
// by piece, to an unnamed temporary file.
package extsort

import (
	"bufio"
	"bytes"
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
)

// Record is a key, by which records are sorted byte by byte, and a value. Both are lent: they
// are valid until the next record is read.
type Record struct{ Key, Value []byte }

// Sorter accepts records in any order and returns them sorted; records of equal keys are in
// no order. It is not safe for concurrent use. Close removes the file.
type Sorter struct {
	limit int
	arena []byte   // records: lengths of key and value, key, value
	index []uint32 // start of each
	file  *os.File
	end   int64 // of the file
	runs  []run // sorted pieces of the file
}

// run is a sorted piece of the file.
type run struct{ off, length int64 }

const (
	header   = 8
	runRead  = 16 << 10
	runWrite = 256 << 10
	// maxLimit keeps places in the arena within 32 bits.
	maxLimit = 1 << 30
)

// New makes a sorter that holds about limit bytes of records in memory.
func New(limit int) *Sorter { return &Sorter{limit: min(max(limit, 1), maxLimit)} }

// Add adds a record; its bytes are copied.
func (s *Sorter) Add(key, value []byte) error {
	size := header + len(key) + len(value)
	if size > maxLimit {
		return fmt.Errorf("sort: record of %d bytes", size)
	}
	// An entry of the index is counted with the record that it is of.
	if len(s.arena) > 0 && len(s.arena)+4*len(s.index)+size+4 > s.limit {
		if err := s.spill(); err != nil {
			return err
		}
	}
	s.index = append(s.index, uint32(len(s.arena)))
	s.arena = binary.LittleEndian.AppendUint32(s.arena, uint32(len(key)))
	s.arena = binary.LittleEndian.AppendUint32(s.arena, uint32(len(value)))
	s.arena = append(append(s.arena, key...), value...)
	return nil
}

func (s *Sorter) record(at uint32) Record {
	b := s.arena[at:]
	k, v := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
	b = b[header:]
	return Record{Key: b[:k:k], Value: b[k : k+v : k+v]}
}

func (s *Sorter) sort() {
	slices.SortFunc(s.index, func(a, b uint32) int { return bytes.Compare(s.record(a).Key, s.record(b).Key) })
}

// spill moves what is in memory to the file.
func (s *Sorter) spill() error {
	if s.file == nil {
		f, err := os.CreateTemp("", "varve-sort-")
		if err != nil {
			return fmt.Errorf("sort: %w", err)
		}
		s.file = f
		if err := os.Remove(f.Name()); err != nil { // removed with the process
			return fmt.Errorf("sort: %w", err)
		}
	}
	s.sort()
	out := bufio.NewWriterSize(io.NewOffsetWriter(s.file, s.end), runWrite)
	for _, at := range s.index {
		r := s.record(at)
		if _, err := out.Write(s.arena[at : int(at)+header+len(r.Key)+len(r.Value)]); err != nil {
			return fmt.Errorf("sort: %w", err)
		}
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("sort: %w", err)
	}
	s.runs = append(s.runs, run{s.end, int64(len(s.arena))})
	s.end += int64(len(s.arena))
	s.arena, s.index = s.arena[:0], s.index[:0]
	return nil
}

// Sorted returns all records in order; it may be called repeatedly, but no records may be
// added after. An error ends it.
func (s *Sorter) Sorted() iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		if len(s.runs) == 0 {
			s.sort()
			for _, at := range s.index {
				if !yield(s.record(at), nil) {
					return
				}
			}
			return
		}
		if len(s.index) > 0 { // to free the memory for merging
			if err := s.spill(); err != nil {
				yield(Record{}, err)
				return
			}
		}
		s.arena, s.index = nil, nil
		if err := s.merge(yield); err != nil {
			yield(Record{}, err)
		}
	}
}

// merge yields the records of all runs in order.
func (s *Sorter) merge(yield func(Record, error) bool) error {
	var h cursors
	for _, r := range s.runs {
		c := &cursor{in: bufio.NewReaderSize(io.NewSectionReader(s.file, r.off, r.length), runRead)}
		ok, err := c.next()
		if err != nil {
			return err
		}
		if ok {
			h = append(h, c)
		}
	}
	heap.Init(&h)
	for len(h) > 0 {
		c := h[0]
		if !yield(c.rec, nil) {
			return nil
		}
		ok, err := c.next()
		if err != nil {
			return err
		}
		if ok {
			heap.Fix(&h, 0)
		} else {
			heap.Pop(&h)
		}
	}
	return nil
}

// Close closes the file, if there is one.
func (s *Sorter) Close() error {
	s.arena, s.index = nil, nil
	if s.file == nil {
		return nil
	}
	f := s.file
	s.file = nil
	return f.Close()
}

// cursor is the read position in a run.
type cursor struct {
	in  *bufio.Reader
	buf []byte
	rec Record
}

// next reads a record; false at the run's end.
func (c *cursor) next() (bool, error) {
	var h [header]byte
	if _, err := io.ReadFull(c.in, h[:]); errors.Is(err, io.EOF) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("sort: %w", err)
	}
	k, v := int(binary.LittleEndian.Uint32(h[:])), int(binary.LittleEndian.Uint32(h[4:]))
	c.buf = slices.Grow(c.buf[:0], k+v)[:k+v]
	if _, err := io.ReadFull(c.in, c.buf); err != nil {
		return false, fmt.Errorf("sort: %w", err)
	}
	c.rec = Record{Key: c.buf[:k:k], Value: c.buf[k:]}
	return true, nil
}

// cursors is a heap: the least key first.
type cursors []*cursor

func (h cursors) Len() int           { return len(h) }
func (h cursors) Less(i, j int) bool { return bytes.Compare(h[i].rec.Key, h[j].rec.Key) < 0 }
func (h cursors) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *cursors) Push(x any)        { *h = append(*h, x.(*cursor)) } // only cursors
func (h *cursors) Pop() any {
	old := *h
	last := old[len(old)-1]
	*h = old[:len(old)-1]
	return last
}

package ntfs

import (
	"fmt"
	"io"
	"math"
	"slices"
	"sort"
	"sync"

	"github.com/varve-io/varve/fusefs/diskfs"
)

const (
	maxRuns = 2 << 20 // of one stream, 24 bytes each
	// maxUnit bounds a compression unit: 16 clusters, which have 4 KiB at most.
	maxUnit = 64 << 10
)

// run is a range of a stream's clusters that lie together, or nowhere.
type run struct {
	first int64 // of the stream
	count int64
	at    int64 // on the volume; -1 reads as zeroes
}

func (r *run) end() int64 { return r.first + r.count }

// stream is the content of an attribute. Safe for concurrent use once it is whole.
type stream struct {
	fs         *FS
	where      string
	size, init int64 // bytes beyond init read as zeroes
	value      []byte
	resident   bool
	runs       []run
	clusters   int64 // mapped
	unit       int64 // clusters of a compression unit; 0 if not compressed

	mu     sync.Mutex
	cached []byte // the last compression unit that was unpacked
	number int64  // which
}

// stream opens an attribute.
func (r *record) stream(f *FS, typ uint32, name string) (*stream, error) {
	var parts []*attribute
	for i := range r.attrs {
		if a := &r.attrs[i]; a.typ == typ && a.name == name {
			parts = append(parts, a)
		}
	}
	return r.open(f, typ, parts)
}

// open opens an attribute by all its parts, which it sorts.
func (r *record) open(f *FS, typ uint32, parts []*attribute) (*stream, error) {
	where := fmt.Sprintf("record %d attribute %#x", r.ino, typ)
	first := firstPart(parts)
	if first == nil {
		return nil, corrupt(where, "its first part is missing")
	}
	s := &stream{fs: f, where: where, size: first.size, init: first.init, number: -1}
	if first.flags&flagEncrypted != 0 {
		return nil, unsupported("encrypted file (EFS, record %d)", r.ino)
	}
	if first.resident {
		s.resident, s.value = true, first.value
		return s, nil
	}
	if method := first.flags & flagCompressed; method != 0 {
		if method != 1 || first.unit == 0 {
			return nil, unsupported("compression method %d, unit %d (record %d)", method, first.unit, r.ino)
		}
		if first.unit > 16 || f.clusterSize<<first.unit > maxUnit {
			return nil, corrupt(where, "compression unit of 2^%d clusters", first.unit)
		}
		s.unit = 1 << first.unit
	}
	parts = slices.DeleteFunc(parts, func(a *attribute) bool { return a.resident })
	sort.SliceStable(parts, func(i, j int) bool { return parts[i].first < parts[j].first })
	for _, a := range parts {
		if err := s.extend(a); err != nil {
			return nil, err
		}
	}
	return s, s.whole()
}

// extend adds the part of the mapping that follows: pairs of a run's length and its
// distance on the volume from the run before. The first byte has the lengths of both
// numbers, length in the lower half; no distance means that the run lies nowhere.
func (s *stream) extend(a *attribute) error {
	if a.first != uint64(s.clusters) {
		return corrupt(s.where, "a part maps from cluster %d on, want %d", a.first, s.clusters)
	}
	limit := math.MaxInt64 / s.fs.clusterSize
	at := int64(0)
	for b := a.mapping; len(b) > 0 && b[0] != 0; {
		n, m := int(b[0]&15), int(b[0]>>4)
		if n == 0 || n > 8 || m > 8 || 1+n+m > len(b) {
			return corrupt(s.where, "mapping with header %#x", b[0])
		}
		count := signed(b[1 : 1+n])
		if count <= 0 || count > limit-s.clusters {
			return corrupt(s.where, "run of %d clusters", count)
		}
		r := run{first: s.clusters, count: count, at: -1}
		if m > 0 {
			at += signed(b[1+n : 1+n+m])
			if at < 0 || at >= s.fs.clusters || count > s.fs.clusters-at {
				return corrupt(s.where, "%d clusters at %d of %d", count, at, s.fs.clusters)
			}
			r.at = at
		}
		if len(s.runs) == maxRuns {
			return corrupt(s.where, "more than %d runs", maxRuns)
		}
		s.runs = append(s.runs, r)
		s.clusters += count
		b = b[1+n+m:]
	}
	if uint64(s.clusters) != a.last+1 {
		return corrupt(s.where, "a part maps up to cluster %d, want %d", s.clusters-1, int64(a.last))
	}
	return nil
}

// signed reads a little-endian number of one to eight bytes.
func signed(b []byte) int64 {
	v := int64(int8(b[len(b)-1]))
	for i := len(b) - 2; i >= 0; i-- {
		v = v<<8 | int64(b[i])
	}
	return v
}

// whole checks that all of the stream is mapped.
func (s *stream) whole() error {
	if s.init > s.size {
		s.init = s.size
	}
	if s.size > s.clusters*s.fs.clusterSize {
		return corrupt(s.where, "%d bytes in %d clusters", s.size, s.clusters)
	}
	return nil
}

// find gives the first run that ends after a cluster.
func (s *stream) find(cluster int64) int {
	return sort.Search(len(s.runs), func(i int) bool { return s.runs[i].end() > cluster })
}

// read fills p, which must lie within the stream.
func (s *stream) read(p []byte, off int64) error {
	if off < 0 || off > s.size || int64(len(p)) > s.size-off {
		return corrupt(s.where, "byte %d of %d", off+int64(len(p)), s.size)
	}
	if zero := off + int64(len(p)) - s.init; zero > 0 {
		zero = min(zero, int64(len(p)))
		clear(p[int64(len(p))-zero:])
		p = p[:int64(len(p))-zero]
	}
	switch {
	case len(p) == 0:
		return nil
	case s.resident:
		copy(p, s.value[off:])
		return nil
	case s.unit != 0:
		return s.readUnits(p, off)
	}
	return s.readRuns(p, off)
}

// readRuns reads what is stored as it is.
func (s *stream) readRuns(p []byte, off int64) error {
	size := s.fs.clusterSize
	for i := s.find(off / size); len(p) > 0; i++ {
		if i == len(s.runs) {
			return corrupt(s.where, "byte %d is not mapped", off)
		}
		r := &s.runs[i]
		part := p
		if left := r.end()*size - off; int64(len(part)) > left {
			part = part[:left]
		}
		if r.at < 0 {
			clear(part)
		} else if err := s.fs.read(part, r.at*size+off-r.first*size); err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// readUnits reads a compressed stream by its units.
func (s *stream) readUnits(p []byte, off int64) error {
	size := s.unit * s.fs.clusterSize
	for len(p) > 0 {
		n, err := s.readUnit(p, off/size, off%size)
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// readUnit copies from one unit, which stays in memory: readers continue in it.
func (s *stream) readUnit(p []byte, number, from int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.number != number {
		b, err := s.unpack(number)
		if err != nil {
			return 0, err
		}
		s.cached, s.number = b, number
	}
	return copy(p, s.cached[from:]), nil
}

// unpack reads a unit: all its clusters are there if it is not compressed, none if it is
// zeroes, and else the first ones.
func (s *stream) unpack(number int64) ([]byte, error) {
	size := s.fs.clusterSize
	first := number * s.unit
	end := min(first+s.unit, s.clusters)
	stored := int64(0)
	for i := s.find(first); i < len(s.runs) && s.runs[i].first < end; i++ {
		if s.runs[i].at >= 0 {
			stored += min(s.runs[i].end(), end) - max(s.runs[i].first, first)
		}
	}
	out := make([]byte, s.unit*size)
	if stored == 0 {
		return out, nil
	}
	if stored == end-first {
		return out, s.readRuns(out[:(end-first)*size], first*size)
	}
	packed := make([]byte, stored*size)
	if err := s.readRuns(packed, first*size); err != nil {
		return nil, err
	}
	if err := unpackLZNT1(out, packed); err != nil {
		return nil, corrupt(fmt.Sprintf("%s compression unit %d", s.where, number), "%v", err)
	}
	return out, nil
}

// next finds data from off on.
func (s *stream) next(off int64) (diskfs.Extent, error) {
	end := min(s.size, s.init)
	if off >= end {
		return diskfs.Extent{}, io.EOF
	}
	if s.resident {
		return diskfs.Extent{Offset: off, Length: end - off, Device: -1}, nil
	}
	size := s.fs.clusterSize
	for i := s.find(off / size); i < len(s.runs); i++ {
		r := s.runs[i]
		if r.at < 0 {
			continue
		}
		start, stop, device := max(off, r.first*size), r.end()*size, r.at*size
		if s.unit != 0 { // what a unit has anywhere is data of all of it
			start = max(off, r.first/s.unit*s.unit*size)
			stop = (r.end() + s.unit - 1) / s.unit * s.unit * size
			device = -1
		} else {
			device += start - r.first*size
		}
		if start >= end {
			break
		}
		return diskfs.Extent{Offset: start, Length: min(stop, end) - start, Device: device}, nil
	}
	return diskfs.Extent{}, io.EOF
}

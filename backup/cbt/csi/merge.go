package csi

import (
	"fmt"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/internal/bytesize"
)

// merge turns the messages of successive calls into one ascending list of ranges, each byte
// once. It enforces KEP-3314: one type and one capacity, ranges within the capacity,
// ascending offsets, no overlap. It keeps only the last offset.
type merge struct {
	name string
	size int64 // of the device; anySize if there is none
	emit func(cbt.Extent) error

	// end is the end of the last range, where the next call continues. What a call lists
	// before it is skipped.
	end      int64
	capacity int64 // -1 before the first message
	kind     api.BlockMetadataType
	fixed    int64 // length of the ranges of FIXED_LENGTH; 0 before the first

	callEnd  int64 // end of the last range of this call
	first    bool  // of this call
	reported int64
	ranges   int64
}

func newMerge(name string, size int64, emit func(cbt.Extent) error) *merge {
	return &merge{name: name, size: size, emit: emit, capacity: -1}
}

// begin starts a new call, from end on.
func (m *merge) begin() { m.callEnd, m.first = 0, true }

// complete reports whether the last range ended at the end of the volume, so that nothing can
// follow. Some drivers refuse a call from there.
func (m *merge) complete() bool { return m.capacity >= 0 && m.end >= m.capacity }

// add merges a message.
func (m *merge) add(kind api.BlockMetadataType, capacity int64, ranges []*api.BlockMetadata) error {
	if err := m.checkHead(kind, capacity); err != nil {
		return err
	}

	for _, r := range ranges {
		if err := m.addRange(r.GetByteOffset(), r.GetSizeBytes()); err != nil {
			return err
		}
	}
	return nil
}

func (m *merge) checkHead(kind api.BlockMetadataType, capacity int64) error {
	switch {
	case kind != api.BlockMetadataType_FIXED_LENGTH && kind != api.BlockMetadataType_VARIABLE_LENGTH:
		return m.malformed(cbt.ErrFormat, "the block metadata type is %d", int32(kind))
	case capacity < 0 || capacity == 0 && m.size != 0 && m.size != anySize:
		return m.malformed(cbt.ErrFormat, "the capacity is %s", bytesize.Exact(capacity))
	case capacity > m.size:
		return &cbt.Error{
			Source: m.name, Kind: cbt.ErrSizeMismatch, Reason: cbt.ReasonSizeMismatch,
			Detail: fmt.Sprintf("the driver reports a volume of %s, and the device has %s: its offsets may not be those of the device", bytesize.Exact(capacity), bytesize.Exact(m.size)),
		}
	case m.capacity >= 0 && capacity != m.capacity:
		return m.malformed(cbt.ErrFormat, "the capacity changed from %s to %s", bytesize.Exact(m.capacity), bytesize.Exact(capacity))
	case m.capacity >= 0 && kind != m.kind:
		return m.malformed(cbt.ErrFormat, "the block metadata type changed from %s to %s", m.kind, kind)
	}

	m.capacity, m.kind = capacity, kind
	return nil
}

// addRange merges a range of a message.
func (m *merge) addRange(offset, length int64) error {
	first := m.first
	m.first = false
	m.ranges++

	switch {
	case offset < 0 || length <= 0:
		return m.malformed(cbt.ErrOutOfRange, "offset %d, length %d: the one may not be negative, the other is at least 1", offset, length)
	case offset < m.callEnd:
		return m.malformed(cbt.ErrOverlap, "a range of %d bytes at offset %d follows one that ends at %d: offsets must increase", length, offset, m.callEnd)
	case offset >= m.capacity:
		return m.malformed(cbt.ErrOutOfRange, "offset %d is beyond the end of the volume, which has %s", offset, bytesize.Exact(m.capacity))
	}

	if err := m.checkFixed(offset, length, first); err != nil {
		return err
	}

	rest := m.capacity - offset
	if length > rest && (m.kind != api.BlockMetadataType_FIXED_LENGTH || length != m.fixed) {
		return m.malformed(cbt.ErrOutOfRange, "offset %d, length %d ends beyond the volume, which has %s", offset, length, bytesize.Exact(m.capacity))
	}

	// The last block of a fixed length may extend beyond the end.
	end := offset + min(length, rest)
	m.callEnd = end
	from := max(offset, m.end)

	if from >= end {
		return nil // a call that repeats what came before it broke
	}

	m.end = end
	return m.put(from, end)
}

// checkFixed checks the length of a FIXED_LENGTH range. Only the last block of a volume may
// be shorter, and the first of a call that was cut at the requested offset.
func (m *merge) checkFixed(offset, length int64, first bool) error {
	if m.kind != api.BlockMetadataType_FIXED_LENGTH || length == m.fixed {
		return nil
	}

	last := length == m.capacity-offset

	switch {
	case m.fixed == 0 && !last && (!first || m.end == 0):
		m.fixed = length
	case m.fixed == 0 || length < m.fixed && (last || first && m.end > 0):
	default:
		return m.malformed(cbt.ErrFormat, "a block of %d bytes among blocks of the fixed length of %d", length, m.fixed)
	}
	return nil
}

func (m *merge) put(from, end int64) error {
	m.reported += end - from
	return m.emit(cbt.Extent{Offset: from, Length: end - from})
}

// finish adds what the driver does not know: the part of the device beyond its capacity,
// where a device was rounded up.
func (m *merge) finish() error {
	if m.capacity < 0 || m.size == anySize || m.capacity >= m.size {
		return nil
	}
	return m.put(m.capacity, m.size)
}

func (m *merge) malformed(kind error, format string, args ...any) error {
	return &cbt.Error{
		Source: m.name, Kind: kind, Reason: cbt.ReasonMalformed,
		Detail: "the driver's answer breaks the rules of KEP-3314: " + fmt.Sprintf(format, args...),
	}
}

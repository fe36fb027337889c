package csi

import (
	"fmt"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/api"

	"github.com/varve-io/varve/backup/cbt"
)

// merge turns the messages of one call after the other into one ascending list of
// ranges, each byte once. It holds the messages to KEP-3314: one type and one capacity,
// ranges within the capacity, offsets that increase, none overlapping. Nothing is kept
// but the last offset.
type merge struct {
	name string
	size int64 // of the device; anySize if there is none
	emit func(cbt.Extent) error

	// end is that of the last range: where a call goes on. What a call says of the
	// bytes before it was said already.
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

// begin is a new call, from end on.
func (m *merge) begin() { m.callEnd, m.first = 0, true }

// complete says that the last range ended where the volume does, so that nothing can
// follow. Some drivers refuse to be asked from there.
func (m *merge) complete() bool { return m.capacity >= 0 && m.end >= m.capacity }

// add takes a message.
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
		return m.malformed(cbt.ErrFormat, "the capacity is %d bytes", capacity)
	case capacity > m.size:
		return &cbt.Error{
			Source: m.name, Kind: cbt.ErrSizeMismatch, Reason: cbt.ReasonSizeMismatch,
			Detail: fmt.Sprintf("the driver speaks of a volume of %d bytes, the device has %d: its offsets may not be the device's", capacity, m.size),
		}
	case m.capacity >= 0 && capacity != m.capacity:
		return m.malformed(cbt.ErrFormat, "the capacity changed from %d to %d bytes", m.capacity, capacity)
	case m.capacity >= 0 && kind != m.kind:
		return m.malformed(cbt.ErrFormat, "the block metadata type changed from %s to %s", m.kind, kind)
	}

	m.capacity, m.kind = capacity, kind

	return nil
}

// addRange takes a range of a message.
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
		return m.malformed(cbt.ErrOutOfRange, "offset %d is behind the volume's %d bytes", offset, m.capacity)
	}

	if err := m.checkFixed(offset, length, first); err != nil {
		return err
	}

	rest := m.capacity - offset
	if length > rest && (m.kind != api.BlockMetadataType_FIXED_LENGTH || length != m.fixed) {
		return m.malformed(cbt.ErrOutOfRange, "offset %d, length %d ends behind the volume, which has %d bytes", offset, length, m.capacity)
	}

	// The last of the blocks of a fixed length may hang over.
	end := offset + min(length, rest)
	m.callEnd = end
	from := max(offset, m.end)

	if from >= end {
		return nil // a call that repeats what came before it broke
	}

	m.end = end

	return m.put(from, end)
}

// checkFixed holds FIXED_LENGTH to its word. Shorter are the last block of a volume, and
// the first of a call that was cut at the offset asked for.
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

// finish adds what the driver cannot know of: the part of the device behind its
// capacity, where a device was rounded up.
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

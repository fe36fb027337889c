package probe

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"unicode/utf16"

	"github.com/varve-io/varve/internal/zero"
)

var (
	le = binary.LittleEndian
	be = binary.BigEndian

	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// Most signatures stand in the first or in the last bytes, which are read at once.
const (
	headSize = 72 << 10
	tailSize = 136 << 10 // md 0.90 and DDF are up to 128 KiB before the end
)

// prober reads pieces of a device; what lies beyond its end reads as zeroes. The first
// error of the device ends all probing.
type prober struct {
	r     io.ReaderAt
	size  int64
	whole bool // a disk, not a partition
	err   error

	head, tail []byte

	tableRead bool
	partTable *Table
	tableErr  error
}

func newProber(r io.ReaderAt, size int64) *prober { return &prober{r: r, size: max(size, 0)} }

// bytes gives n bytes at off. The caller must not change them.
func (p *prober) bytes(off int64, n int) []byte {
	if off >= 0 && off <= headSize-int64(n) {
		if p.head == nil {
			p.head = make([]byte, headSize)
			p.fill(p.head, 0)
		}
		return p.head[off : off+int64(n)]
	}
	if start := p.size - tailSize; off >= start && start >= 0 && off <= p.size-int64(n) {
		if p.tail == nil {
			p.tail = make([]byte, tailSize)
			p.fill(p.tail, start)
		}
		return p.tail[off-start:][:n]
	}
	b := make([]byte, n)
	p.fill(b, off)
	return b
}

func (p *prober) fill(b []byte, off int64) {
	if off < 0 || off >= p.size || p.err != nil {
		return
	}
	part := b[:min(int64(len(b)), p.size-off)]
	if n, err := p.r.ReadAt(part, off); n < len(part) && err != nil && !errors.Is(err, io.EOF) {
		p.err = fmt.Errorf("read %d bytes at %d: %w", len(part), off, err)
	}
}

// has reports whether magic stands at off.
func (p *prober) has(off int64, magic string) bool {
	return off >= 0 && off <= p.size-int64(len(magic)) && string(p.bytes(off, len(magic))) == magic
}

// covered reports whether a partition covers a range: then what stands there belongs to
// the partition.
func (p *prober) covered(off, length int64) bool {
	if !p.whole || off < 0 || length < 0 {
		return false
	}
	table, err := p.table()
	if table == nil || err != nil {
		return false
	}
	for _, part := range table.Partitions {
		if off >= part.Start && length <= part.Length && off-part.Start <= part.Length-length {
			return true
		}
	}
	return false
}

// describe says what stands in the places where most signatures do.
func (p *prober) describe() string {
	if p.size == 0 {
		return "the volume is empty"
	}
	for _, at := range []int64{0, 510, 1024, 1080, 4096, 32768, 65536} {
		if !zero.Only(p.bytes(at, 8)) {
			return "the data has no known signature: it is encrypted, or of an unknown kind"
		}
	}
	return "there are only zeroes where signatures should be"
}

func powerOfTwo[T uint8 | uint16 | uint32 | uint64 | int64](n T) bool { return n > 0 && n&(n-1) == 0 }

// within reports whether n is a power of two between low and high.
func within(n, low, high uint32) bool { return powerOfTwo(n) && n >= low && n <= high }

// uuid prints 16 bytes in their order; empty for zeroes.
func uuid(b []byte) string {
	if zero.Only(b[:16]) {
		return ""
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// guid prints a GUID of Microsoft's kind: the first three parts are little-endian.
func guid(b []byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

// serial prints the serial number of a FAT volume.
func serial(b []byte) string {
	if zero.Only(b[:4]) {
		return ""
	}
	return fmt.Sprintf("%02X%02X-%02X%02X", b[3], b[2], b[1], b[0])
}

// text is a string that ends at the first NUL, without space at its end.
func text(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return strings.ToValidUTF8(strings.TrimRight(string(b), " \t\r\n"), "\uFFFD")
}

// text16 is the same in UTF-16.
func text16(b []byte, order binary.ByteOrder) string {
	var units []uint16
	for ; len(b) >= 2; b = b[2:] {
		u := order.Uint16(b)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return strings.TrimRight(string(utf16.Decode(units)), " ")
}

// cleared gives a copy of b with n bytes at off set to fill: how checksums treat their own place.
func cleared(b []byte, off, n int, fill byte) []byte {
	b = bytes.Clone(b)
	for i := range n {
		b[off+i] = fill
	}
	return b
}

// rawCRC32 is a CRC-32 that begins with seed and is not inverted at its end, as C code
// that calls crc32_le computes it.
func rawCRC32(seed uint32, table *crc32.Table, b []byte) uint32 {
	return ^crc32.Update(^seed, table, b)
}

const badChecksum = "the checksum of its superblock is wrong"

// unless gives text unless ok.
func unless(ok bool, text string) string {
	if ok {
		return ""
	}
	return text
}

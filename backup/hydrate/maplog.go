package hydrate

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// The map file is a header and records, little-endian:
//
//	header  8 "VARVEHYD", 4 version, 4 length of the identity, 8 unit,
//	        8 image size, the identity, 4 CRC-32C of all before
//	record  8 first unit, 4 count, 4 kind (1 data, 2 zeroes), 4 CRC-32C of the
//	        unit's bytes (data; the count is 1 then), 4 CRC-32C of the header's
//	        and of the 20 bytes before
//
// Later records win. Reading stops at the first record that is incomplete or not of this
// header: a crash interrupted its write.
const (
	mapMagic   = "VARVEHYD"
	mapVersion = 1
	recordSize = 24
	maxID      = 200 // it is a file name, too
)

const (
	kindData uint32 = 1
	kindZero uint32 = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header binds a map to its image.
type header struct {
	id         string
	size, unit int64
}

func (h header) units() int64 { return (h.size + h.unit - 1) / h.unit }

func (h header) encode() []byte {
	b := []byte(mapMagic)
	b = binary.LittleEndian.AppendUint32(b, mapVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(h.id)))
	b = binary.LittleEndian.AppendUint64(b, uint64(h.unit))
	b = binary.LittleEndian.AppendUint64(b, uint64(h.size))
	b = append(b, h.id...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// record is one unit of data, or a run of zero units.
type record struct {
	unit  int64
	count uint32
	kind  uint32
	sum   uint32
}

func (r record) append(b []byte, seed uint32) []byte {
	start := len(b)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.unit))
	b = binary.LittleEndian.AppendUint32(b, r.count)
	b = binary.LittleEndian.AppendUint32(b, r.kind)
	b = binary.LittleEndian.AppendUint32(b, r.sum)
	return binary.LittleEndian.AppendUint32(b, crc32.Update(seed, castagnoli, b[start:]))
}

// parseRecord parses a record; false if it cannot belong to this map.
func parseRecord(b []byte, seed uint32, units int64) (record, bool) {
	if crc32.Update(seed, castagnoli, b[:20]) != binary.LittleEndian.Uint32(b[20:]) {
		return record{}, false
	}
	first := binary.LittleEndian.Uint64(b)
	r := record{
		unit: int64(first), count: binary.LittleEndian.Uint32(b[8:]),
		kind: binary.LittleEndian.Uint32(b[12:]), sum: binary.LittleEndian.Uint32(b[16:]),
	}
	if first >= uint64(units) || r.count == 0 || int64(r.count) > units-r.unit {
		return record{}, false
	}
	return r, r.kind == kindZero || r.kind == kindData && r.count == 1
}

// errOther means that a map is of another image, or none at all.
var errOther = errors.New("the map is of another image")

// readMap reads a map, calls apply for each record and returns the length of the valid part,
// header included.
func readMap(rd io.Reader, want header, apply func(record)) (int64, error) {
	r := bufio.NewReaderSize(rd, 64<<10)
	head := want.encode()
	got := make([]byte, len(head))
	if _, err := io.ReadFull(r, got); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, errOther
	} else if err != nil {
		return 0, fmt.Errorf("read the map: %w", err)
	}
	if !bytes.Equal(got, head) {
		return 0, errOther
	}
	seed := binary.LittleEndian.Uint32(head[len(head)-4:])
	end := int64(len(head))
	var b [recordSize]byte
	for {
		if _, err := io.ReadFull(r, b[:]); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return end, nil
		} else if err != nil {
			return 0, fmt.Errorf("read the map: %w", err)
		}
		rec, ok := parseRecord(b[:], seed, want.units())
		if !ok {
			return end, nil
		}
		apply(rec)
		end += recordSize
	}
}

// mapLog is an open map file. One goroutine at a time appends.
type mapLog struct {
	file *os.File
	seed uint32
	end  int64
}

// openMap opens and reads the map in the directory of a copy, or makes an empty one if there
// is none of this image; fresh reports which.
func openMap(dir *os.Root, h header, apply func(record)) (l *mapLog, fresh bool, err error) {
	f, err := dir.OpenFile("map", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, false, fmt.Errorf("open the map: %w", err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	head := h.encode()
	l = &mapLog{file: f, seed: binary.LittleEndian.Uint32(head[len(head)-4:])}
	l.end, err = readMap(f, h, apply)
	if errors.Is(err, errOther) {
		fresh, l.end = true, int64(len(head))
		if err = f.Truncate(0); err == nil {
			_, err = f.WriteAt(head, 0)
		}
	}
	if err == nil {
		err = f.Truncate(l.end) // the rest would look like records of a later run
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return nil, false, fmt.Errorf("make the map: %w", err)
	}
	return l, fresh, nil
}

// append makes records durable.
func (l *mapLog) append(records []record) error {
	b := make([]byte, 0, min(len(records), 4096)*recordSize)
	for len(records) > 0 {
		n := min(len(records), 4096)
		b = b[:0]
		for _, r := range records[:n] {
			b = r.append(b, l.seed)
		}
		if _, err := l.file.WriteAt(b, l.end); err != nil {
			return err
		}
		l.end += int64(len(b))
		records = records[n:]
	}
	return unix.Fdatasync(int(l.file.Fd()))
}

func (l *mapLog) close() error { return l.file.Close() }

package xfs

// A record ("Log Records") is a header of one sector, further sectors of header for
// each 32 KiB of its size beyond the first, and data. Since each sector of the ring
// begins with the cycle, the four bytes that belong there stand in the headers.
const (
	recordMagic    = 0xfeedbabe
	cycleDataBytes = 32 << 10 // data whose first bytes one header sector holds
	cycleDataWords = cycleDataBytes / sector

	recOffCycle     = 4
	recOffVersion   = 8
	recOffLen       = 12
	recOffLSN       = 16
	recOffTail      = 24
	recOffCRC       = 32
	recOffOps       = 40
	recOffCycleData = 44
	recOffFormat    = 300
	recOffUUID      = 304
	recOffSize      = 320

	extOffCycleData = 4

	// How much of the header the checksum covers is the size of a C structure, which
	// i386 pads less.
	recChecksummed     = 328
	recChecksummedI386 = 324
	extChecksummed     = 260

	formatLinuxLE = 1
)

// record is the header of a log record.
type record struct {
	blk     int // sector where it begins
	headers int // sectors
	length  int // bytes of data
	ops     int
	lsn     uint64 // cycle and sector where it begins
	tail    uint64 // lsn of the oldest record whose changes are not all in place
	bad     bool   // the header makes no sense
}

func (r *record) sectors() int { return r.headers + (r.length+sector-1)/sector }

// end is the sector after the record, in a ring of n, or -1 if that is not known.
func (r *record) end(n int) int {
	if r.bad {
		return -1
	}
	return (r.blk + r.sectors()) % n
}

func (r *record) tailBlk() int { return int(uint32(r.tail)) }

// record reads the header at blk.
func (l *logRing) record(blk int) (record, error) {
	b, err := l.read(blk, 1)
	if err != nil {
		return record{}, err
	}
	if be32(b, 0) != recordMagic {
		return record{}, corrupt(sectorName(blk), "no record begins there")
	}
	r := record{
		blk:     blk,
		headers: 1,
		length:  int(be32(b, recOffLen)),
		ops:     int(be32(b, recOffOps)),
		lsn:     be64(b, recOffLSN),
		tail:    be64(b, recOffTail),
	}
	version, size := be32(b, recOffVersion), be32(b, recOffSize)
	if version&2 != 0 && size > cycleDataBytes {
		r.headers = int(min(size, maxRecordBytes)+cycleDataBytes-1) / cycleDataBytes
	}
	switch {
	case version != 1 && version != 2:
		return record{}, corrupt(sectorName(blk), "record version %d", version)
	case r.length <= 0 || r.length > min(maxRecordBytes, r.headers*cycleDataBytes) || size > maxRecordBytes && version == 2:
		return record{}, corrupt(sectorName(blk), "record of %d bytes, at most %d", r.length, size)
	case r.sectors() > l.n:
		return record{}, corrupt(sectorName(blk), "record of %d sectors", r.sectors())
	case uint32(r.lsn) != uint32(blk) || uint32(r.lsn>>32) != be32(b, recOffCycle):
		return record{}, corrupt(sectorName(blk), "record with sequence number %#x in cycle %d", r.lsn, be32(b, recOffCycle))
	case [16]byte(b[recOffUUID:recOffUUID+16]) != l.f.sb.uuid:
		return record{}, corrupt(sectorName(blk), "record of another file system")
	}
	if format := be32(b, recOffFormat); format != formatLinuxLE {
		return record{}, unsupported("a log in format %d (1 is that of little-endian Linux)", format)
	}
	return r, nil
}

// recordData reads the data of a record, verifies its checksum and puts the bytes back
// in place that the cycles displaced.
func (l *logRing) recordData(r record) ([]byte, error) {
	b, err := l.read(r.blk, r.sectors())
	if err != nil {
		return nil, err
	}
	head, data := b[:r.headers*sector], b[r.headers*sector:]
	// mkfs.xfs writes its one record without a checksum.
	byMkfs := r.ops == 1 && le32(head, recOffCRC) == 0
	if l.f.sb.v5 && !byMkfs {
		sum := func(covered int) uint32 {
			crc := checksum(head[:covered], recOffCRC)
			// Of the further headers, those count that the data needs; the mount's buffers
			// (logbsize) can have room for more.
			for j := 1; j < (r.length+cycleDataBytes-1)/cycleDataBytes; j++ {
				crc = crcUpdate(crc, head[j*sector:j*sector+extChecksummed])
			}
			return crcUpdate(crc, data[:r.length])
		}
		if want := le32(head, recOffCRC); want != sum(recChecksummed) && want != sum(recChecksummedI386) {
			return nil, corrupt(sectorName(r.blk), "record checksum mismatch")
		}
	}
	for j := range len(data) / sector {
		from := head[recOffCycleData+j*4:]
		if h := j / cycleDataWords; h > 0 {
			from = head[h*sector+extOffCycleData+j%cycleDataWords*4:]
		}
		copy(data[j*sector:], from[:4])
	}
	return data[:r.length], nil
}

// walk calls each for every record from tail to head, oldest first.
func (l *logRing) walk(ends logEnds, each func(r record, data []byte) error) error {
	seen := 0
	for blk := ends.tail; ; {
		r, err := l.record(blk)
		if err != nil {
			return err
		}
		if seen += r.sectors(); seen > l.n {
			return corrupt(sectorName(blk), "records do not lead to the head at sector %d", ends.head)
		}
		data, err := l.recordData(r)
		if err != nil {
			return err
		}
		if err := each(r, data); err != nil {
			return err
		}
		if blk = r.end(l.n); blk == ends.head {
			return nil
		}
	}
}

package ext4

import (
	"fmt"
	"slices"
)

// The log holds transactions with rising numbers: descriptor blocks, each followed by
// the blocks whose places its tags give; revoke blocks, which take back what the
// same or earlier transactions logged; and a commit block. What follows the last
// commit never happened.
const (
	tagEscaped  = 0x1
	tagSameUUID = 0x2
	tagLast     = 0x8

	tagUUID          = 16
	logTail          = 4  // checksum at the end of descriptor and revoke blocks
	revokeHeader     = 16 // header and number of bytes in use
	commitHeader     = 60
	commitChecksum   = 16
	commitTime       = 48
	commitCRC32      = 1 // type of checksum v1
	commitCRC32Size  = 4
	fastTagHead      = 9
	fastHeadTransact = 8 // place of the transaction number in a head
)

// logTag is a block that a transaction logged.
type logTag struct {
	block    uint64 // on the volume
	pos      int64  // of its bytes in the journal
	tid      uint32
	checksum uint32 // v2: the low 16 bits
	escaped  bool
}

// revocation is a block that a transaction took back.
type revocation struct {
	block uint64
	tid   uint32
}

// maxRevokes bounds the memory for revoked blocks, some 50 bytes each. Blocks of a journal may lie
// in one place, so its length is no bound.
const maxRevokes = 16 << 20

// scan is the state of a walk along the log.
type scan struct {
	*journal
	at  uint64 // next block of the log
	tid uint32 // of the transaction at hand

	tags    []logTag     // of committed transactions, and after committed of the one at hand
	revokes []revocation // likewise

	committedTags    int
	committedRevokes int
	maxRevokes       int

	crc      uint32 // checksum v1 of the transaction at hand
	lastTime uint64 // of the last commit
	suspect  bool   // a checksum failed: fine only if the commit turns out to be old
	steps    uint64

	buf    []byte // bytes of the device from bufPos on
	bufPos int64
}

// replay walks the log and gives the last state of each block that it holds. As in
// the kernel (fs/jbd2/recovery.c), a transaction counts if its commit block is there and
// right, and a log in which a checksum of what would be replayed is wrong is refused as a
// whole: what a mount would show is not known then.
func (j *journal) replay() (overlay, error) {
	s := &scan{journal: j, at: j.start, tid: j.sequence, crc: ^uint32(0), maxRevokes: maxRevokes}
	for {
		more, err := s.step()
		if err != nil {
			return nil, err
		}
		if !more {
			break
		}
	}
	if err := s.refuseFastCommits(); err != nil {
		return nil, err
	}
	revoked := map[uint64]uint32{} // block: last transaction that revoked it
	for _, r := range s.revokes[:s.committedRevokes] {
		if last, ok := revoked[r.block]; !ok || after(r.tid, last) {
			revoked[r.block] = r.tid
		}
	}
	over := overlay{}
	for _, t := range s.tags[:s.committedTags] {
		if last, ok := revoked[t.block]; ok && !after(t.tid, last) {
			continue
		}
		if j.checksums() {
			if err := s.verifyLogged(t); err != nil {
				return nil, err
			}
		}
		over[t.block] = loggedBlock{pos: t.pos, escaped: t.escaped}
	}
	return over, nil
}

// after compares transaction numbers, which wrap around.
func after(a, b uint32) bool { return int32(a-b) > 0 }

// advance moves over n blocks of the log. A log cannot be longer than its ring.
func (s *scan) advance() error {
	s.at = s.next(s.at)
	if s.steps++; s.steps > s.last-s.first {
		return corrupt("journal", "the log has no end")
	}
	return nil
}

// step takes in one descriptor, revoke or commit block; false at the log's end.
func (s *scan) step() (bool, error) {
	at := s.at
	b, _, err := s.block(at)
	if err != nil {
		return false, err
	}
	if be.Uint32(b) != journalMagic || be.Uint32(b[8:]) != s.tid {
		return false, nil
	}
	// The last block of a full ring may be stepped over without harm: what follows
	// is the ring's start with a number that does not fit.
	if err := s.advance(); err != nil {
		return false, err
	}
	where := fmt.Sprintf("journal block %d", at)
	switch be.Uint32(b[4:]) {
	case journalDescriptor:
		if s.checksums() && !s.verifyTail(b) {
			s.suspect = true
		}
		return true, s.descriptor(b, where)
	case journalRevoke:
		if s.checksums() && !s.verifyTail(b) {
			s.suspect = true
		}
		return true, s.revoke(b, where)
	case journalCommit:
		return s.commit(b, where)
	}
	return false, nil
}

func (s *scan) verifyTail(b []byte) bool {
	at := len(b) - logTail
	return checksumWithout(s.seed, b, at) == be.Uint32(b[at:])
}

// tagSize gives the bytes of a tag without UUID.
func (j *journal) tagSize() int {
	if j.has(journalIncompatCsumV3) {
		return 16
	}
	size := 8
	if j.has(journalIncompat64bit) {
		size += 4
	}
	if j.has(journalIncompatCsumV2) {
		size += 2
	}
	return size
}

// descriptor takes in the tags of a descriptor block and steps over their blocks.
func (s *scan) descriptor(b []byte, where string) error {
	v1 := s.compat&journalCompatChecksum != 0
	if v1 {
		s.crc = crc32be(s.crc, b)
	}
	room := b[journalHeader:]
	if s.checksums() {
		room = room[:len(room)-logTail]
	}
	for size := s.tagSize(); len(room) >= size; {
		tag, flags := s.parseTag(room)
		room = room[size:]
		if flags&tagSameUUID == 0 {
			room = room[min(tagUUID, len(room)):]
		}
		pos, err := s.position(s.at)
		if err != nil {
			return err
		}
		if v1 {
			data, _, err := s.block(s.at)
			if err != nil {
				return err
			}
			s.crc = crc32be(s.crc, data)
		}
		tag.pos, tag.tid = pos, s.tid
		if err := s.advance(); err != nil {
			return err
		}
		if tag.block >= uint64(s.fs.dev.size)>>s.fs.sb.blockBits && !s.suspect {
			return corrupt(where, "logs block %d, beyond the device", tag.block)
		}
		s.tags = append(s.tags, tag)
		if flags&tagLast != 0 {
			break
		}
	}
	return nil
}

func (s *scan) parseTag(b []byte) (tag logTag, flags uint32) {
	tag.block = uint64(be.Uint32(b))
	high := 8
	if s.has(journalIncompatCsumV3) {
		flags = be.Uint32(b[4:])
		tag.checksum = be.Uint32(b[12:])
	} else {
		flags = uint32(be.Uint16(b[6:]))
		tag.checksum = uint32(be.Uint16(b[4:]))
	}
	if s.has(journalIncompat64bit) {
		tag.block |= uint64(be.Uint32(b[high:])) << 32
	}
	tag.escaped = flags&tagEscaped != 0
	return tag, flags
}

// verifyLogged checks a logged block: over the transaction's number and the block as it
// stands in the journal.
func (s *scan) verifyLogged(t logTag) error {
	mask := uint32(0xffff)
	if s.has(journalIncompatCsumV3) {
		mask = ^uint32(0)
	}
	b, err := s.ahead(t.pos)
	if err != nil {
		return err
	}
	tid := be.AppendUint32(nil, t.tid)
	if got := crc32c(crc32c(s.seed, tid), b) & mask; got != t.checksum {
		return corrupt(fmt.Sprintf("journal transaction %d block %d", t.tid, t.block), "checksum %08x, computed %08x", t.checksum, got)
	}
	return nil
}

// journalAhead is how much of the journal is read at once, in bytes.
const journalAhead = 1 << 20

// ahead gives the block at a place of the device. Blocks of the log mostly follow each
// other.
func (s *scan) ahead(pos int64) ([]byte, error) {
	size := int64(s.fs.sb.blockSize)
	if pos < s.bufPos || pos+size > s.bufPos+int64(len(s.buf)) {
		s.buf = slices.Grow(s.buf[:0], journalAhead)[:min(journalAhead, s.fs.dev.size-pos)]
		s.bufPos = pos
		if err := s.fs.dev.readAt(s.buf, pos); err != nil {
			s.buf = s.buf[:0]
			return nil, err
		}
	}
	return s.buf[pos-s.bufPos:][:size], nil
}

// revoke takes in the block numbers of a revoke block.
func (s *scan) revoke(b []byte, where string) error {
	used, room := int64(be.Uint32(b[journalHeader:])), int64(len(b))
	if s.checksums() {
		room -= logTail
	}
	if used < revokeHeader || used > room {
		return corrupt(where, "%d bytes of revoked blocks in %d", used, room)
	}
	size := 4
	if s.has(journalIncompat64bit) {
		size = 8
	}
	for list := b[revokeHeader:used]; len(list) >= size; list = list[size:] {
		block := uint64(be.Uint32(list))
		if size == 8 {
			block = be.Uint64(list)
		}
		if len(s.revokes) == s.maxRevokes {
			return unsupported(fmt.Sprintf("a journal that revokes more than %d blocks", s.maxRevokes))
		}
		s.revokes = append(s.revokes, revocation{block, s.tid})
	}
	return nil
}

// commit ends a transaction if its commit block is right. Blocks of an earlier use of
// the journal can look like the log's continuation; they give themselves away by a
// failing checksum and an older time, and then the log ends before them. Any other failing
// checksum is damage, except of a commit block that was written while the blocks before it
// still were (async_commit): that transaction never happened.
func (s *scan) commit(b []byte, where string) (bool, error) {
	when := be.Uint64(b[commitTime:])
	if s.suspect || !s.commitIntact(b) {
		if when < s.lastTime {
			return false, nil
		}
		if !s.suspect && s.has(journalIncompatAsyncCommit) {
			return false, nil
		}
		return false, corrupt(where, "transaction %d: checksum mismatch", s.tid)
	}
	s.lastTime = when
	s.crc = ^uint32(0)
	s.committedTags, s.committedRevokes = len(s.tags), len(s.revokes)
	s.tid++
	return true, nil
}

func (s *scan) commitIntact(b []byte) bool {
	stored := be.Uint32(b[commitChecksum:])
	switch {
	case s.compat&journalCompatChecksum != 0:
		typ, size := b[12], b[13]
		return (stored == s.crc && typ == commitCRC32 && size == commitCRC32Size) ||
			(stored == 0 && typ == 0 && size == 0)
	case s.checksums():
		if checksumWithout(s.seed, b, commitChecksum) == stored {
			return true
		}
		// Only the header may have reached the disk, over an older block's rest.
		whole := make([]byte, len(b))
		copy(whole, b[:commitHeader])
		return checksumWithout(s.seed, whole, commitChecksum) == stored
	}
	return true
}

// refuseFastCommits refuses a journal whose fast-commit area continues the log:
// it begins with a head for the transaction after the last committed one.
func (s *scan) refuseFastCommits() error {
	if !s.has(journalIncompatFastCommit) {
		return nil
	}
	// The kernel leaves one block between the log and the area.
	b, _, err := s.block(s.last + 1)
	if err != nil {
		return err
	}
	// Tag and length of 16 bits, features and transaction of 32, little-endian.
	if le.Uint16(b) == fastTagHead && le.Uint32(b[fastHeadTransact:]) == s.tid {
		return unsupported(fmt.Sprintf("fast_commit (the journal holds fast commits after transaction %d)", s.tid-1))
	}
	return nil
}

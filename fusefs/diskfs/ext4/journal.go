package ext4

import (
	"encoding/binary"
	"fmt"
)

// The journal (kernel documentation, "Journal (jbd2)") is a file of blocks, numbers in
// it big-endian. Block 0 is its superblock:
//
//	0x00 magic, block type, sequence     0x24 compat, incompat, ro_compat features
//	0x0c block size                      0x30 UUID
//	0x10 length in blocks                0x50 type of checksum
//	0x14 first block of the log          0x54 number of fast-commit blocks
//	0x18 first transaction in the log    0xfc checksum
//	0x1c where that begins; 0: log empty
const (
	journalMagic       = 0xc03b3998
	journalHeader      = 12 // magic, block type, sequence
	journalSuperblock  = 1024
	journalMaxBlocks   = 10240000 // the most that mke2fs makes
	journalFastDefault = 256      // fast-commit blocks where the superblock says 0

	journalDescriptor = 1
	journalCommit     = 2
	journalSuperV1    = 3
	journalSuperV2    = 4
	journalRevoke     = 5

	journalCompatChecksum = 0x1

	journalIncompatRevoke      = 0x1
	journalIncompat64bit       = 0x2
	journalIncompatAsyncCommit = 0x4
	journalIncompatCsumV2      = 0x8
	journalIncompatCsumV3      = 0x10
	journalIncompatFastCommit  = 0x20
	journalIncompatSupported   = journalIncompatRevoke | journalIncompat64bit | journalIncompatAsyncCommit |
		journalIncompatCsumV2 | journalIncompatCsumV3 | journalIncompatFastCommit
)

var be = binary.BigEndian

// journal is an opened journal with a log to replay.
type journal struct {
	fs       *FS // without overlay: the journal itself is never in the journal
	file     *inode
	first    uint64 // the log's blocks are first..last-1
	last     uint64
	start    uint64 // where transaction sequence begins; 0: the log is empty
	sequence uint32
	compat   uint32
	incompat uint32
	seed     uint32 // of checksums v2 and v3
	cached   run    // the last run looked up
}

func (j *journal) has(incompat uint32) bool { return j.incompat&incompat != 0 }

// checksums reports whether each block of the log is checked (v2 or v3).
func (j *journal) checksums() bool {
	return j.has(journalIncompatCsumV2 | journalIncompatCsumV3)
}

// recoverJournal gives the blocks that a mount would write from the journal.
func (f *FS) recoverJournal() (overlay, error) {
	if f.sb.journalIno == 0 {
		return nil, unsupported("external journal " + formatUUID(f.sb.journalUUID))
	}
	file, err := f.inode(uint64(f.sb.journalIno))
	if err != nil {
		return nil, corrupt("journal", "%v", err)
	}
	if file.typ() != modeRegular || file.has(flagInlineData) {
		return nil, corrupt("journal", "inode %d is no regular file", f.sb.journalIno)
	}
	j := &journal{fs: f, file: file}
	if err := j.readSuperblock(); err != nil {
		return nil, err
	}
	if j.start == 0 {
		return nil, nil
	}
	return j.replay()
}

func (j *journal) readSuperblock() error {
	const where = "journal superblock"
	b, _, err := j.block(0)
	if err != nil {
		return err
	}
	sb := b[:journalSuperblock]
	typ := be.Uint32(sb[4:])
	if be.Uint32(sb) != journalMagic || (typ != journalSuperV1 && typ != journalSuperV2) {
		return corrupt(where, "magic number %08x, type %d", be.Uint32(sb), typ)
	}
	if size := be.Uint32(sb[0xc:]); int64(size) != int64(j.fs.sb.blockSize) {
		return corrupt(where, "blocks of %d bytes, the volume's are of %d", size, j.fs.sb.blockSize)
	}
	length := uint64(be.Uint32(sb[0x10:]))
	j.first, j.last = uint64(be.Uint32(sb[0x14:])), length
	j.sequence, j.start = be.Uint32(sb[0x18:]), uint64(be.Uint32(sb[0x1c:]))
	if typ == journalSuperV2 {
		j.compat, j.incompat = be.Uint32(sb[0x24:]), be.Uint32(sb[0x28:])
	}
	if unknown := j.incompat &^ journalIncompatSupported; unknown != 0 {
		return unsupported(fmt.Sprintf("journal feature %#x", unknown))
	}
	if j.checksums() {
		if err := j.verifySuperblock(sb, where); err != nil {
			return err
		}
	}
	if length > uint64(j.file.size)>>j.fs.sb.blockBits || length > j.fs.sb.blocks || length > journalMaxBlocks {
		return corrupt(where, "%d blocks in a file of %d bytes", length, j.file.size)
	}
	if j.has(journalIncompatFastCommit) {
		fast := uint64(be.Uint32(sb[0x54:]))
		if fast == 0 {
			fast = journalFastDefault
		}
		if fast < 2 || fast >= j.last {
			return corrupt(where, "%d fast-commit blocks of %d", fast, j.last)
		}
		j.last -= fast
	}
	if j.first == 0 || j.first >= j.last || (j.start != 0 && (j.start < j.first || j.start >= j.last)) {
		return corrupt(where, "log in blocks %d to %d, begins at %d", j.first, j.last, j.start)
	}
	return nil
}

func (j *journal) verifySuperblock(sb []byte, where string) error {
	if j.has(journalIncompatCsumV2) && j.has(journalIncompatCsumV3) || j.compat&journalCompatChecksum != 0 {
		return corrupt(where, "checksums of several versions at once")
	}
	const crc32cType = 4
	if t := sb[0x50]; t != crc32cType {
		return unsupported(fmt.Sprintf("journal checksum type %d", t))
	}
	if got, want := checksumWithout(^uint32(0), sb, 0xfc), be.Uint32(sb[0xfc:]); got != want {
		return corrupt(where, "checksum %08x, computed %08x", want, got)
	}
	j.seed = crc32c(^uint32(0), sb[0x30:0x40])
	return nil
}

// checksumWithout is the checksum of p with the four bytes at off taken as zero.
func checksumWithout(seed uint32, p []byte, off int) uint32 {
	crc := crc32c(seed, p[:off])
	crc = crc32c(crc, []byte{0, 0, 0, 0})
	return crc32c(crc, p[off+4:])
}

// position gives the place of a block of the journal, in bytes of the device.
func (j *journal) position(n uint64) (int64, error) {
	if n < j.cached.start || n-j.cached.start >= j.cached.count {
		r, err := j.file.lookupRun(n)
		if err != nil {
			return 0, err
		}
		if r.block == 0 {
			return 0, corrupt("journal", "block %d is a hole", n)
		}
		j.cached = r
	}
	return int64(j.cached.block+n-j.cached.start) << j.fs.sb.blockBits, nil
}

// block reads a block of the journal and returns its place.
func (j *journal) block(n uint64) ([]byte, int64, error) {
	pos, err := j.position(n)
	if err != nil {
		return nil, 0, err
	}
	b := make([]byte, j.fs.sb.blockSize)
	return b, pos, j.fs.dev.readAt(b, pos)
}

// next gives the block of the log that follows n: the log is a ring.
func (j *journal) next(n uint64) uint64 {
	if n++; n >= j.last {
		return j.first
	}
	return n
}

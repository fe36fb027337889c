package xfs

import (
	"encoding/binary"
)

// Inode items ("Inode Updates"): a description, the inode's core, and as ilf_fields
// says what changed of the data fork and of the attribute fork.
const (
	inoItemSize   = 56
	inoItemSize32 = 52 // of 32-bit machines, without the padding before ilf_ino

	inoFieldDData   = 0x002
	inoFieldDExt    = 0x004
	inoFieldDBroot  = 0x008
	inoFieldDev     = 0x010
	inoFieldAData   = 0x040
	inoFieldAExt    = 0x080
	inoFieldABroot  = 0x100
	inoFieldDOwner  = 0x200
	inoFieldAOwner  = 0x400
	inoFieldData    = inoFieldDData | inoFieldDExt | inoFieldDBroot
	inoFieldAttr    = inoFieldAData | inoFieldAExt | inoFieldABroot
	maxInodeBuffer  = 1 << 7 // sectors: clusters have up to 64 KiB
	maxFlushCounter = 0xffff
)

// inode applies an inode item.
func (rp *replay) inode(it *logItem, lsn uint64) error {
	f := rp.f
	b := it.regions[0]
	switch len(b) {
	case inoItemSize:
	case inoItemSize32:
		b = append(append(append([]byte(nil), b[:12]...), 0, 0, 0, 0), b[12:]...)
	default:
		return corrupt("log", "INODE item of %d bytes", len(b))
	}
	fields, ino := le32(b, 4), le64(b, 16)
	key := bufKey{int64(le64(b, 40)), int(int32(le32(b, 48)))}
	at := int64(int32(le32(b, 52)))
	if rp.cancelled[key] > 0 {
		return nil
	}
	if key.blkno < 0 || key.blkno > 1<<54 || key.n <= 0 || key.n > maxInodeBuffer ||
		at < 0 || at%f.sb.inodeSize != 0 || at > int64(key.n)*sector-f.sb.inodeSize {
		return corrupt("log", "INODE item of inode %d: byte %d of %d sectors at %d", ino, at, key.n, key.blkno)
	}
	at += key.blkno * sector
	if len(it.regions) < 2 || len(it.regions[1]) < coreSizeV2-4 {
		return corrupt("log", "INODE item of inode %d without a core", ino)
	}
	disk := make([]byte, f.sb.inodeSize)
	if err := f.dev.readAt(disk, at); err != nil {
		return err
	}
	if be16(disk, 0) != inodeMagic {
		return corrupt("log", "INODE item of inode %d: magic number %#x at byte %d", ino, be16(disk, 0), at)
	}
	if fields&(inoFieldDOwner|inoFieldAOwner) != 0 {
		f.pending.setNewOwner(ino)
	}
	core := it.regions[1]
	if le16(core, 0) != inodeMagic {
		return corrupt("log", "INODE item of inode %d with magic number %#x", ino, le16(core, 0))
	}
	coreSize := coreSizeV2
	if f.sb.v5 {
		coreSize = coreSizeV3
		if len(core) < coreSizeV3 || core[diVersion] != 3 {
			return corrupt("log", "INODE item of inode %d with version %d in %d bytes", ino, core[diVersion], len(core))
		}
		if got := be64(disk, diLSN); got != 0 && got != ^uint64(0) && got > lsn {
			return nil // written in place since
		}
	} else if was, is := be16(disk, diFlushIter), le16(core, diFlushIter); is < was &&
		!(was == maxFlushCounter && is < maxFlushCounter/2) {
		return nil
	}
	coreToDisk(core, disk, lsn)

	literal := disk[coreSize:]
	split := len(literal)
	if off := int(disk[diForkoff]) * 8; off != 0 {
		if off >= len(literal) {
			return corrupt("log", "INODE item of inode %d: attribute fork at byte %d of %d", ino, off, len(literal))
		}
		split = off
	}
	if fields&inoFieldDev != 0 {
		binary.BigEndian.PutUint32(literal, le32(b, 24))
	}
	region := 2
	for _, k := range []struct {
		logged, root uint32
		into         []byte
	}{
		{fields & inoFieldData, inoFieldDBroot, literal[:split]},
		{fields & inoFieldAttr, inoFieldABroot, literal[split:]},
	} {
		if k.logged == 0 {
			continue
		}
		// An empty fork has a flag and no region.
		if region >= len(it.regions) {
			break
		}
		data := it.regions[region]
		region++
		if k.logged == k.root {
			if err := rootToDisk(data, k.into, f.bmapHeaderSize()); err != nil {
				return err
			}
			continue
		}
		copy(k.into, data) // regions are padded to whole words
	}
	return f.dev.over.write(disk, at)
}

// coreToDisk turns the core of an inode as the log has it, in the order of the machine
// that wrote it, into that on disk. It leaves alone what the log does not hold: the
// chain of unlinked inodes and the checksum.
func coreToDisk(core, disk []byte, lsn uint64) {
	u16 := func(off int) { binary.BigEndian.PutUint16(disk[off:], le16(core, off)) }
	u32 := func(off int) { binary.BigEndian.PutUint32(disk[off:], le32(core, off)) }
	u64 := func(off int) { binary.BigEndian.PutUint64(disk[off:], le64(core, off)) }
	v3 := core[diVersion] == 3
	var flags2 uint64
	if v3 {
		flags2 = le64(core, diFlags2)
	}
	// A time stamp is one number with bigtime, else two.
	stamp := func(off int) {
		if flags2&flag2Bigtime != 0 {
			u64(off)
		} else {
			u32(off)
			u32(off + 4)
		}
	}
	u16(0)
	u16(diMode)
	disk[diVersion], disk[diFormat] = core[diVersion], core[diFormat]
	if core[diVersion] == 1 {
		u16(diOnlink)
	} else {
		disk[diOnlink], disk[diOnlink+1] = 0, 0
	}
	u32(diUID)
	u32(diGID)
	u32(diNlink)
	u16(20) // project id
	u16(22)
	switch {
	case flags2&flag2Nrext64 != 0:
		u64(diBigExt)
	default:
		clear(disk[diBigExt : diBigExt+8]) // and the flush counter begins anew
	}
	stamp(diAtime)
	stamp(diMtime)
	stamp(diCtime)
	u64(diSize)
	u64(diNblocks)
	u32(diExtsize)
	u32(diNextents)
	u16(diAextents)
	disk[diForkoff], disk[diAformat] = core[diForkoff], core[diAformat]
	u32(diDmevmask)
	u16(diDmstate)
	u16(diFlags)
	u32(diGen)
	if !v3 {
		return
	}
	u64(diChange)
	binary.BigEndian.PutUint64(disk[diLSN:], lsn)
	u64(diFlags2)
	u32(diCowext)
	clear(disk[diPad2:diCrtime])
	stamp(diCrtime)
	u64(diIno)
	copy(disk[diUUID:coreSizeV3], core[diUUID:coreSizeV3])
}

// rootToDisk turns the root of a fork's tree as the log has it, which is a whole tree
// block with its header and room for as many records as it is long, into that in an
// inode, which has as much room as the fork has.
func rootToDisk(root, into []byte, hdr int) error {
	if len(root) < hdr || len(into) < 4 {
		return corrupt("log", "tree root of %d bytes for a fork of %d", len(root), len(into))
	}
	n, room, diskRoom := int(be16(root, 6)), (len(root)-hdr)/16, rootRecords(len(into))
	if n > room || n > diskRoom {
		return corrupt("log", "tree root of %d records in %d bytes for a fork of %d", n, len(root), len(into))
	}
	copy(into, root[4:8]) // level and number of records
	copy(into[4:], root[hdr:hdr+n*8])
	copy(into[4+diskRoom*8:], root[hdr+room*8:hdr+room*8+n*8])
	return nil
}

// icreate makes the inodes of a new chunk, which the log does not hold: group, block in
// it, number, size of each, blocks, generation ("Inode Creation").
func (rp *replay) icreate(it *logItem) error {
	f := rp.f
	b := it.regions[0]
	if len(b) < 28 {
		return corrupt("log", "ICREATE item of %d bytes", len(b))
	}
	ag, agbno, count, size := be32(b, 4), be32(b, 8), be32(b, 12), be32(b, 16)
	length, gen := be32(b, 20), be32(b, 24)
	maxChunk := uint32(max(64, 1<<f.sb.inopbLog)) // inodes
	if ag >= f.sb.agCount || int64(size) != f.sb.inodeSize || count == 0 || count > maxChunk ||
		uint64(count)*uint64(size) != uint64(length)<<f.sb.blockLog {
		return corrupt("log", "ICREATE item: %d inodes of %d bytes in %d blocks of group %d", count, size, length, ag)
	}
	fsb := uint64(ag)<<f.sb.agBlkLog | uint64(agbno)
	at, ok := f.sb.offset(fsb, uint64(length))
	if !ok || uint64(agbno) >= 1<<f.sb.agBlkLog {
		return corrupt("log", "ICREATE item: block %d of group %d", agbno, ag)
	}
	// If the chunk was freed later, so were all buffers in it.
	for blk := range int64(length) {
		if rp.byBlkno[(at+blk<<f.sb.blockLog)/sector] > 0 {
			return nil
		}
	}
	first := fsb << f.sb.inopbLog
	inodes := make([]byte, int64(count)*f.sb.inodeSize)
	for j := range uint64(count) {
		raw := inodes[int64(j)*f.sb.inodeSize:]
		binary.BigEndian.PutUint16(raw, inodeMagic)
		raw[diVersion] = 2
		binary.BigEndian.PutUint32(raw[diGen:], gen)
		binary.BigEndian.PutUint32(raw[diUnlinked:], 0xffffffff)
		if f.sb.v5 {
			raw[diVersion] = 3
			binary.BigEndian.PutUint64(raw[diIno:], first+j)
			copy(raw[diUUID:], f.sb.metaUUID[:])
		}
	}
	return f.dev.over.write(inodes, at)
}

package xfs

import (
	"fmt"
	"math/bits"
)

// Log items ("Log Items"), by type. Intents say that an operation of several
// transactions has begun; the matching done item says that it was finished.
const (
	itemEFI      = 0x1236 // extent free
	itemEFD      = 0x1237
	itemIunlink  = 0x1238
	itemInode    = 0x123b
	itemBuf      = 0x123c
	itemDquot    = 0x123d
	itemQuotaoff = 0x123e
	itemIcreate  = 0x123f
	itemRUI      = 0x1240 // reverse mapping
	itemRUD      = 0x1241
	itemCUI      = 0x1242 // reference count
	itemCUD      = 0x1243
	itemBUI      = 0x1244 // file mapping
	itemBUD      = 0x1245
	itemATTRI    = 0x1246 // attribute
	itemATTRD    = 0x1247
	itemXMI      = 0x1248 // exchange of file mappings
	itemXMD      = 0x1249
	itemEFIRt    = 0x124a // the same on the realtime device
	itemEFDRt    = 0x124b
	itemRUIRt    = 0x124c
	itemRUDRt    = 0x124d
	itemCUIRt    = 0x124e
	itemCUDRt    = 0x124f
)

var itemNames = map[uint16]string{
	itemEFI: "EFI", itemEFD: "EFD", itemIunlink: "IUNLINK", itemInode: "INODE", itemBuf: "BUF",
	itemDquot: "DQUOT", itemQuotaoff: "QUOTAOFF", itemIcreate: "ICREATE", itemRUI: "RUI",
	itemRUD: "RUD", itemCUI: "CUI", itemCUD: "CUD", itemBUI: "BUI", itemBUD: "BUD",
	itemATTRI: "ATTRI", itemATTRD: "ATTRD", itemXMI: "XMI", itemXMD: "XMD",
}

func itemName(kind uint16) string {
	if name, ok := itemNames[kind]; ok {
		return name
	}
	return fmt.Sprintf("of type %#x", kind)
}

// Buffer items: type, number of regions, flags, length in sectors, sector, words in
// the map, and the map, which has a bit for each chunk of 128 bytes that was logged.
const (
	bufOffFlags   = 4
	bufOffLen     = 6
	bufOffBlkno   = 8
	bufOffMapSize = 16
	bufOffMap     = 20
	bufChunk      = 128

	bufInodes   = 1 << 0
	bufCancel   = 1 << 1
	bufUserQ    = 1 << 2
	bufProjectQ = 1 << 3
	bufGroupQ   = 1 << 4
)

// bufKey names a buffer, as the log does: by place and length in sectors.
type bufKey struct {
	blkno int64
	n     int
}

// replay applies a log to the file system's overlay.
type replay struct {
	f *FS
	// cancelled counts the items that say that a buffer was freed, from here on to
	// the end of the log. Changes before the last of them must not be applied: the
	// blocks may by then hold a file's data, which is not in the log.
	cancelled map[bufKey]int
	byBlkno   map[int64]int // the same by place only
	quotaOff  uint32
	intents   []*intent // oldest first
	ended     int       // of intents
	byID      map[intentKey]*intent
	held      int // bytes of intents that are not done
	edits     int // see maxEdits

	maxCancelled, maxHeld int
}

func newReplay(f *FS) *replay {
	return &replay{
		f: f, cancelled: map[bufKey]int{}, byBlkno: map[int64]int{}, byID: map[intentKey]*intent{},
		maxCancelled: maxCancelled, maxHeld: maxIntentBytes,
	}
}

const (
	// maxCancelled bounds the memory for buffers that were freed, some 60 bytes each.
	maxCancelled = 4 << 20
	// maxIntentBytes bounds that for operations that were begun: a few for each process at work.
	maxIntentBytes = 256 << 20
)

// replay applies the log between ends: one pass to find the buffers that were freed,
// one to apply the changes, and then what was begun and not finished.
func (l *logRing) replay(ends logEnds) error {
	f := l.f
	if unknown := f.sb.logIncompat &^ logIncompatXattr; unknown != 0 {
		return unsupported("log feature bits %#x", unknown)
	}
	over := newOverlay(&device{r: f.dev.r, size: f.dev.size})
	rp := newReplay(f)
	pass := func(commit func(*transaction) error) error {
		return l.walk(ends, newAssembler(commit).add)
	}
	if err := pass(rp.collect); err != nil {
		return err
	}
	f.dev.over = over
	if err := pass(rp.apply); err != nil {
		return err
	}
	return rp.finishIntents()
}

// collect is the first pass.
func (rp *replay) collect(t *transaction) error {
	for _, it := range t.items {
		switch it.kind {
		case itemBuf:
			b, err := parseBufItem(it)
			if err != nil {
				return err
			}
			if b.flags&bufCancel != 0 {
				rp.cancelled[b.key]++
				rp.byBlkno[b.key.blkno]++
				if len(rp.cancelled) > rp.maxCancelled {
					return unsupported("a log that frees more than %d buffers", rp.maxCancelled)
				}
			}
		case itemQuotaoff:
			if len(it.regions[0]) < 8 {
				return corrupt("log", "QUOTAOFF item of %d bytes", len(it.regions[0]))
			}
			rp.quotaOff |= le32(it.regions[0], 4)
		case itemInode, itemDquot, itemIcreate, itemEFI, itemEFD, itemRUI, itemRUD, itemCUI, itemCUD,
			itemBUI, itemBUD, itemATTRI, itemATTRD, itemXMI, itemXMD,
			itemEFIRt, itemEFDRt, itemRUIRt, itemRUDRt, itemCUIRt, itemCUDRt:
		default:
			return unsupported("a log item %s", itemName(it.kind))
		}
	}
	return nil
}

// apply is the second pass. Within a transaction buffers come first, since inodes go
// into them, and notes of freed buffers last, since what precedes them depends on them.
func (rp *replay) apply(t *transaction) error {
	var buffers, others, cancels []*logItem
	for _, it := range t.items {
		switch {
		case it.kind == itemIcreate:
			buffers = append(buffers, it)
		case it.kind == itemBuf && le16(it.regions[0], bufOffFlags)&bufCancel != 0:
			cancels = append(cancels, it)
		case it.kind == itemBuf:
			buffers = append(buffers, it)
		default:
			others = append(others, it)
		}
	}
	for _, list := range [][]*logItem{buffers, others, cancels} {
		for _, it := range list {
			if len(it.regions) < it.total {
				return corrupt("log", "item %s with %d of %d regions", itemName(it.kind), len(it.regions), it.total)
			}
			if err := rp.item(it, t.lsn); err != nil {
				return fmt.Errorf("log item %s: %w", itemName(it.kind), err)
			}
		}
	}
	return nil
}

func (rp *replay) item(it *logItem, lsn uint64) error {
	switch it.kind {
	case itemBuf:
		return rp.buffer(it, lsn)
	case itemInode:
		return rp.inode(it, lsn)
	case itemDquot:
		return rp.dquot(it, lsn)
	case itemIcreate:
		return rp.icreate(it)
	case itemBUI, itemATTRI, itemXMI:
		return rp.begin(it)
	case itemBUD, itemATTRD, itemXMD:
		return rp.end(it)
	}
	// Skipped, since nothing that reads files, directories or attributes uses what
	// they change: QUOTAOFF (collected before), and the intents to free extents (EFI),
	// to update reverse mappings (RUI) and reference counts (CUI), on either device.
	// They concern the trees of free space, owners and sharing; a mount finishes them so
	// that it can allocate.
	return nil
}

// bufItem is the description of a buffer item.
type bufItem struct {
	key   bufKey
	flags uint16
	bits  []byte // map, 32-bit little-endian words
}

func parseBufItem(it *logItem) (bufItem, error) {
	b := it.regions[0]
	if len(b) < bufOffMap {
		return bufItem{}, corrupt("log", "BUF item of %d bytes", len(b))
	}
	words := le32(b, bufOffMapSize)
	if uint64(words)*4 > uint64(len(b)-bufOffMap) {
		return bufItem{}, corrupt("log", "BUF item of %d bytes with a map of %d words", len(b), words)
	}
	item := bufItem{
		key:   bufKey{int64(le64(b, bufOffBlkno)), int(le16(b, bufOffLen))},
		flags: le16(b, bufOffFlags),
		bits:  b[bufOffMap : bufOffMap+words*4],
	}
	if item.key.blkno < 0 || item.key.blkno > 1<<54 || item.key.n == 0 {
		return bufItem{}, corrupt("log", "BUF item of %d sectors at sector %d", item.key.n, item.key.blkno)
	}
	return item, nil
}

// run gives the next run of ones in the map from bit on: where it begins, and how
// long it is, which is 0 at the end.
func (b bufItem) run(bit int) (start, n int) {
	size := len(b.bits) * 8
	for bit < size {
		w := le32(b.bits, bit/32*4) >> (bit % 32)
		if w == 0 {
			bit = (bit/32 + 1) * 32
			continue
		}
		bit += bits.TrailingZeros32(w)
		break
	}
	for start = bit; bit < size && b.bits[bit/8]&(1<<(bit%8)) != 0; bit++ {
		n++
	}
	return start, n
}

func (rp *replay) cancel(key bufKey) {
	if rp.cancelled[key]--; rp.cancelled[key] == 0 {
		delete(rp.cancelled, key)
	}
	if rp.byBlkno[key.blkno]--; rp.byBlkno[key.blkno] == 0 {
		delete(rp.byBlkno, key.blkno)
	}
}

// buffer applies the logged chunks of a buffer.
func (rp *replay) buffer(it *logItem, lsn uint64) error {
	b, err := parseBufItem(it)
	if err != nil {
		return err
	}
	if b.flags&bufCancel != 0 {
		rp.cancel(b.key)
		return nil
	}
	if rp.cancelled[b.key] > 0 {
		return nil
	}
	switch {
	case b.flags&bufInodes != 0:
		// Of such a buffer nothing counts but the inodes' di_next_unlinked, which chains
		// inodes that no directory names any more.
		return nil
	case b.flags&bufUserQ != 0 && rp.quotaOff&quotaUser != 0,
		b.flags&bufProjectQ != 0 && rp.quotaOff&quotaProject != 0,
		b.flags&bufGroupQ != 0 && rp.quotaOff&quotaGroup != 0:
		return nil
	}
	base, size := b.key.blkno*sector, b.key.n*sector
	if rp.f.sb.v5 {
		newer, err := rp.newer(base, size, lsn)
		if err != nil || newer {
			return err
		}
	}
	region := 1
	for bit := 0; ; {
		start, n := b.run(bit)
		if n == 0 {
			break
		}
		if region >= len(it.regions) {
			return corrupt("log", "BUF item at sector %d with %d regions, its map has more", b.key.blkno, len(it.regions))
		}
		// A run can be split into regions where pages meet.
		data := it.regions[region]
		if len(data) < n*bufChunk {
			n = len(data) / bufChunk
		}
		if n == 0 || (start+n)*bufChunk > size {
			return corrupt("log", "BUF item at sector %d: %d bytes at chunk %d", b.key.blkno, len(data), start)
		}
		if err := rp.f.dev.over.write(data[:n*bufChunk], base+int64(start*bufChunk)); err != nil {
			return err
		}
		bit = start + n
		region++
	}
	if b.key.blkno == 0 {
		// The superblock: the file system may have grown.
		sb, err := readSuperblock(&rp.f.dev)
		if err != nil {
			return err
		}
		rp.f.sb = sb
	}
	return nil
}

// lsnPlaces says where blocks that begin with a magic number keep the sequence number
// of their last change, and the UUID that says that it is one of this file system's.
var lsnPlaces = map[uint32]struct{ lsn, uuid int }{
	0x41423342:      {24, 32}, // "AB3B", free space by place
	0x41423343:      {24, 32}, // "AB3C", free space by size
	0x49414233:      {24, 32}, // "IAB3", inodes
	0x46494233:      {24, 32}, // "FIB3", free inodes
	0x524d4233:      {24, 32}, // "RMB3", reverse mappings
	0x52334643:      {24, 32}, // "R3FC", reference counts
	bmapMagicV5:     {32, 40},
	0x58414746:      {208, 64},  // "XAGF"
	0x58414749:      {320, 296}, // "XAGI"
	0x5841464c:      {24, 8},    // "XAFL"
	0x58534c4d:      {48, 16},   // "XSLM", symbolic link
	dirBlockMagicV5: {16, 24},
	dirDataMagicV5:  {16, 24},
	0x58444633:      {16, 24}, // "XDF3", free space of a directory
}

// newer reports whether the block at base already holds what a transaction changed: it
// was written in place after it. Blocks without a sequence number are taken as older,
// and so is the superblock; that does no harm, since the log continues to their last state.
func (rp *replay) newer(base int64, size int, lsn uint64) (bool, error) {
	head := make([]byte, min(size, 512))
	if err := rp.f.dev.readAt(head, base); err != nil {
		return false, err
	}
	place, ok := lsnPlaces[be32(head, 0)]
	if !ok {
		switch be16(head, 8) {
		case leaf1MagicV5, leafNMagicV5, nodeMagicV5, attrLeafMagicV5:
			place = struct{ lsn, uuid int }{24, 32}
		default:
			return false, nil
		}
	}
	if [16]byte(head[place.uuid:place.uuid+16]) != rp.f.sb.metaUUID {
		return false, nil
	}
	got := be64(head, place.lsn)
	return got != 0 && got != ^uint64(0) && got >= lsn, nil
}

// Quota items: type, number of regions, id, sector, length in sectors, offset of the
// quota in that. Nothing that this package shows comes from quotas, but what
// is on the volume shall be what a mount makes of it.
const (
	quotaUser    = 0x0001 // XFS_UQUOTA_ACCT and so on, in QUOTAOFF
	quotaProject = 0x0008
	quotaGroup   = 0x0040

	dquotMagic  = 0x4451 // "DQ"
	dquotSize   = 104
	dquotLSN    = 112
	dquotRecord = 136
)

func (rp *replay) dquot(it *logItem, lsn uint64) error {
	b := it.regions[0]
	if len(b) < 24 || len(it.regions) < 2 || len(it.regions[1]) < dquotSize {
		return corrupt("log", "DQUOT item of %d bytes", len(b))
	}
	quota := it.regions[1][:dquotSize]
	if be16(quota, 0) != dquotMagic {
		return corrupt("log", "DQUOT item with magic number %#x", be16(quota, 0))
	}
	off := map[byte]uint32{1: quotaUser, 2: quotaProject, 4: quotaGroup}[quota[3]&7]
	key := bufKey{int64(le64(b, 8)), int(int32(le32(b, 16)))}
	at := int64(le32(b, 20))
	if rp.quotaOff&off != 0 || rp.cancelled[key] > 0 {
		return nil
	}
	if key.blkno < 0 || key.blkno > 1<<54 || key.n <= 0 || at > int64(key.n)*sector-dquotRecord {
		return corrupt("log", "DQUOT item at byte %d of %d sectors", at, key.n)
	}
	at += key.blkno * sector
	if rp.f.sb.v5 {
		old := make([]byte, dquotRecord)
		if err := rp.f.dev.readAt(old, at); err != nil {
			return err
		}
		if got := be64(old, dquotLSN); be16(old, 0) == dquotMagic && got != 0 && got != ^uint64(0) && got >= lsn {
			return nil
		}
	}
	return rp.f.dev.over.write(quota, at)
}

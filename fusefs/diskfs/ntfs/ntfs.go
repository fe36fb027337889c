// Package ntfs reads NTFS volumes (versions 3.0 and 3.1) through an io.ReaderAt,
// as ntfs-3g would show them with its default options.
//
// NTFS keeps access lists, not modes: all belongs to root, modes are 0755 or, for
// files marked read-only, 0555, unless extended attributes of the Windows Subsystem
// for Linux ($LXUID, $LXGID, $LXMOD, $LXDEV) say more. Link counts are those of the
// names that are shown: short (DOS) names are not. The volume's own files ($MFT, …) are
// hidden. Names compare byte by byte; Windows would ignore case.
//
// Symbolic links of Windows, junctions, and those of WSL, Interix and ntfs-3g are
// symbolic links here: the drive letter of an absolute target is cut off. Files whose
// content stands behind another reparse point (deduplicated, compressed by the
// Windows Overlay Filter, kept in a cloud) are listed, and reading them fails with the
// tag's name. So do encrypted files. Compressed ones are read.
//
// Alternate data streams of up to 64 KiB are extended attributes named "user."
// and the stream; any is also found as "file:stream", though not listed.
//
// $LogFile is not replayed: a volume that was not unmounted cleanly opens only with
// Options.Stale.
//
// Sources: Microsoft's "Master File Table" and [MS-FSCC] (reparse tags and their
// buffers, file attributes), [MS-XCA] 2.5 (LZNT1), and the format documentation of the
// Linux-NTFS project.
package ntfs

import (
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"math/bits"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/internal/bytesize"
)

var le = binary.LittleEndian

const (
	typeName = "ntfs"

	// Records of the master file table with a fixed use.
	inoMFT    = 0
	inoLog    = 2
	inoVolume = 3
	inoRoot   = 5
	firstUser = 16 // those before are the volume's own

	// An inode number is a record's number (48 bits) and, for an alternate data stream,
	// its place among the file's streams from 1 above that.
	recordBits = 48
	recordMask = 1<<recordBits - 1

	maxCluster = 2 << 20
	maxRecord  = 64 << 10
)

// FS is an opened volume. It implements diskfs.Inodes.
type FS struct {
	r           io.ReaderAt
	clusterSize int64 // bytes, as all below
	recordSize  int64
	size        int64
	clusters    int64 // in the volume
	mftStart    int64
	serial      uint64
	label       string
	log         diskfs.LogState
	mft         *stream
}

var _ diskfs.Inodes = (*FS)(nil)

func corrupt(where, format string, args ...any) error {
	return &diskfs.CorruptError{Type: typeName, Where: where, What: fmt.Sprintf(format, args...)}
}

func unsupported(format string, args ...any) error {
	return &diskfs.UnsupportedError{Type: typeName, Feature: fmt.Sprintf(format, args...)}
}

// Open reads the boot sector, the master file table's own record and the state of the
// journal of the volume in the first size bytes of r. Errors: diskfs.ErrNotRecognised,
// diskfs.ErrCorrupt, diskfs.ErrDirtyLog.
func Open(r io.ReaderAt, size int64, opt diskfs.Options) (*FS, error) {
	b := make([]byte, 512)
	if size < int64(len(b)) {
		return nil, fmt.Errorf("ntfs: %d bytes hold no boot sector: %w", size, diskfs.ErrNotRecognised)
	}
	f := &FS{r: r, size: size}
	if err := f.read(b, 0); err != nil {
		return nil, err
	}
	if string(b[3:11]) != "NTFS    " {
		return nil, fmt.Errorf("ntfs: no boot sector: %w", diskfs.ErrNotRecognised)
	}
	if err := f.parse(b); err != nil {
		return nil, err
	}
	if err := f.openTable(); err != nil {
		return nil, err
	}
	if err := f.checkLog(opt.Stale); err != nil {
		return nil, err
	}
	return f, f.readLabel()
}

// The boot sector: bytes per sector at 11 (2 bytes), sectors per cluster at 13, sectors
// at 40 (8), first cluster of the master file table at 48 (8), size of its records at
// 64 and of index blocks at 68 (1, clusters; a negative number n is 2^-n bytes), serial
// number at 72 (8).
func (f *FS) parse(b []byte) error {
	const where = "boot sector"
	sector := int64(le.Uint16(b[11:]))
	if sector < 256 || sector > 4096 || bits.OnesCount64(uint64(sector)) != 1 {
		return corrupt(where, "sectors of %d bytes", sector)
	}
	f.clusterSize = sector * int64(b[13])
	if b[13] > 128 { // as above: clusters of more than 64 KiB
		f.clusterSize = sector << (256 - int(b[13])) // shifts by 127 at most, to 0 then
	}
	if f.clusterSize <= 0 || f.clusterSize > maxCluster || bits.OnesCount64(uint64(f.clusterSize)) != 1 {
		return corrupt(where, "clusters of %d sectors", b[13])
	}
	sectors := le.Uint64(b[40:])
	if sectors == 0 || sectors > uint64(f.size/sector) {
		return corrupt(where, "%d sectors of %d bytes do not fit a device of %s; is the image cut short?", sectors, sector, bytesize.Exact(f.size))
	}
	f.size = int64(sectors) * sector
	f.clusters = f.size / f.clusterSize
	switch n := int8(b[64]); {
	case n > 0:
		f.recordSize = int64(n) * f.clusterSize
	case n > -32:
		f.recordSize = 1 << -n
	}
	if f.recordSize < 512 || f.recordSize > maxRecord || bits.OnesCount64(uint64(f.recordSize)) != 1 {
		return corrupt(where, "records of size %d", int8(b[64]))
	}
	start := le.Uint64(b[48:])
	if start >= uint64(f.clusters) {
		return corrupt(where, "master file table at cluster %d of %d", start, f.clusters)
	}
	f.mftStart = int64(start) * f.clusterSize
	f.serial = le.Uint64(b[72:])
	return nil
}

// openTable finds where the master file table lies. Its own record says so; where that
// does not suffice, more records do, which lie in the part that is known by then.
func (f *FS) openTable() error {
	b := make([]byte, f.recordSize)
	if err := f.read(b, f.mftStart); err != nil {
		return err
	}
	rec, err := parseRecord(b, inoMFT)
	if err != nil {
		return err
	}
	data := rec.find(attrData, "")
	if data == nil || data.resident {
		return corrupt("record 0", "the master file table has no data")
	}
	f.mft = &stream{fs: f, where: "master file table", size: data.size, init: data.init}
	if err := f.mft.extend(data); err != nil {
		return err
	}
	list := rec.find(attrList, "")
	if list == nil {
		return f.mft.whole()
	}
	refs, err := f.listRefs(list, inoMFT)
	if err != nil {
		return err
	}
	for _, ref := range refs {
		more, err := f.extension(ref, inoMFT)
		if err != nil {
			return err
		}
		for i := range more.attrs {
			if a := &more.attrs[i]; a.typ == attrData && a.name == "" && !a.resident {
				if err := f.mft.extend(a); err != nil {
					return err
				}
			}
		}
	}
	return f.mft.whole()
}

// readLabel reads the volume's name.
func (f *FS) readLabel() error {
	rec, err := f.record(inoVolume)
	if err != nil {
		return err
	}
	if a := rec.find(attrVolumeName, ""); a != nil && a.resident {
		f.label = text(a.value)
	}
	return nil
}

// Info describes the volume.
func (f *FS) Info() diskfs.Info {
	return diskfs.Info{
		Type: typeName, Label: f.label, UUID: fmt.Sprintf("%016X", f.serial),
		BlockSize: f.clusterSize, Size: f.size, Free: -1, Log: f.log,
	}
}

// Root is the root directory's inode number.
func (f *FS) Root() uint64 { return inoRoot }

// Inode reads the record of a file, and all that belong to it.
func (f *FS) Inode(ino uint64) (diskfs.Inode, error) {
	n, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	return n, nil
}

// read fills p from the volume.
func (f *FS) read(p []byte, off int64) error {
	return diskfs.ReadWithin(typeName, f.r, f.size, p, off)
}

// record reads a record of the master file table that is in use.
func (f *FS) record(ino uint64) (*record, error) {
	if ino >= uint64(f.mft.size/f.recordSize) {
		return nil, fmt.Errorf("ntfs: no record %d: %w", ino, fs.ErrNotExist)
	}
	b := make([]byte, f.recordSize)
	if err := f.mft.read(b, int64(ino)*f.recordSize); err != nil {
		return nil, err
	}
	return parseRecord(b, ino)
}

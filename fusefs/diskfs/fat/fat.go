// Package fat reads FAT12, FAT16 and FAT32 volumes with long names through an
// io.ReaderAt, as Linux's vfat would show them with its default options.
//
// FAT knows no owners, modes or links: all belongs to root, modes are 0755 or, for
// files marked read-only, 0555, and times are taken as UTC. An inode number is the
// place of the file's entry on the volume. Names compare byte by byte; Linux would
// ignore case.
//
// The format is that of Microsoft's "FAT: General Overview of On-Disk Format" 1.03.
package fat

import (
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/internal/bytesize"
)

var le = binary.LittleEndian

const (
	typeName  = "vfat"
	rootIno   = 1 // no entry stands there: the boot sector does
	entrySize = 32
	// maxDirectory is the greatest size of a directory (65,536 entries).
	maxDirectory = 65536 * entrySize
	tableChunk   = 4096 // of the table, read at once
	tableChunks  = 1024 // kept in memory
)

// FS is an opened volume. It implements diskfs.Inodes.
type FS struct {
	r           io.ReaderAt
	bits        int   // of a table entry: 12, 16 or 32
	sectorSize  int64 // bytes, as all below
	clusterSize int64
	tableStart  int64
	tableSize   int64
	rootStart   int64 // FAT12 and FAT16: where the root directory stands
	rootSize    int64
	rootCluster uint32 // FAT32
	dataStart   int64
	clusters    uint32 // numbered from 2
	size        int64
	label       string
	serial      uint32

	mu     sync.Mutex
	table  map[int64][]byte // chunks of the table
	chunks int              // most of those
}

var _ diskfs.Inodes = (*FS)(nil)

func corrupt(where, format string, args ...any) error {
	return &diskfs.CorruptError{Type: typeName, Where: where, What: fmt.Sprintf(format, args...)}
}

// Open reads the boot sector of the volume in the first size bytes of r. Errors:
// diskfs.ErrNotRecognised, diskfs.ErrCorrupt. FAT has no journal, so opt changes
// nothing.
func Open(r io.ReaderAt, size int64, _ diskfs.Options) (*FS, error) {
	b := make([]byte, 512)
	if size < int64(len(b)) {
		return nil, fmt.Errorf("fat: %d bytes hold no boot sector: %w", size, diskfs.ErrNotRecognised)
	}
	f := &FS{r: r, size: size, table: map[int64][]byte{}, chunks: tableChunks}
	if err := f.read(b, 0); err != nil {
		return nil, err
	}
	if b[510] != 0x55 || b[511] != 0xaa || (b[0] != 0xeb && b[0] != 0xe9) {
		return nil, fmt.Errorf("fat: no boot sector: %w", diskfs.ErrNotRecognised)
	}
	if err := f.parse(b); err != nil {
		return nil, err
	}
	return f, nil
}

// parse computes the volume's layout from the boot sector's parameters.
func (f *FS) parse(b []byte) error {
	const where = "boot sector"
	f.sectorSize = int64(le.Uint16(b[11:]))
	perCluster, reserved, tables := int64(b[13]), int64(le.Uint16(b[14:])), int64(b[16])
	f.rootSize = int64(le.Uint16(b[17:])) * entrySize
	sectors, perTable := int64(le.Uint16(b[19:])), int64(le.Uint16(b[22:]))
	if sectors == 0 {
		sectors = int64(le.Uint32(b[32:]))
	}
	fat32 := perTable == 0
	ext := b[36:]
	if fat32 {
		perTable = int64(le.Uint32(b[36:]))
		f.rootCluster = le.Uint32(b[44:])
		ext = b[64:]
	}
	switch {
	case f.sectorSize < 512 || f.sectorSize > 4096 || f.sectorSize&(f.sectorSize-1) != 0:
		return corrupt(where, "sectors of %d bytes", f.sectorSize)
	case perCluster == 0 || perCluster&(perCluster-1) != 0:
		return corrupt(where, "clusters of %d sectors", perCluster)
	case reserved == 0 || tables == 0 || perTable == 0:
		return corrupt(where, "%d reserved sectors, %d tables of %d", reserved, tables, perTable)
	case sectors > f.size/f.sectorSize:
		return corrupt(where, "%d sectors of %d bytes do not fit a device of %s; is the image cut short?", sectors, f.sectorSize, bytesize.Exact(f.size))
	}
	f.clusterSize = perCluster * f.sectorSize
	f.tableStart, f.tableSize = reserved*f.sectorSize, perTable*f.sectorSize
	if fat32 && b[40]&0x80 != 0 { // tables are not kept alike: one counts
		if active := int64(b[40] & 15); active < tables {
			f.tableStart += active * f.tableSize
		}
	}
	f.rootStart = (reserved + tables*perTable) * f.sectorSize
	f.dataStart = f.rootStart + (f.rootSize+f.sectorSize-1)/f.sectorSize*f.sectorSize
	f.size = sectors * f.sectorSize
	if f.dataStart >= f.size {
		return corrupt(where, "data at byte %d of %d", f.dataStart, f.size)
	}
	clusters := (f.size - f.dataStart) / f.clusterSize
	switch f.bits = 16; {
	case fat32:
		f.bits = 32
	case clusters < 4085:
		f.bits = 12
	}
	// No more clusters than the table has entries for; the first two are not used.
	clusters = min(clusters, f.tableSize*8/int64(f.bits)-2, 0x0ffffff5)
	if clusters < 1 {
		return corrupt(where, "a table of %d bytes", f.tableSize)
	}
	f.clusters = uint32(clusters)
	if fat32 && !f.valid(f.rootCluster) {
		return corrupt(where, "root directory at cluster %d of %d", f.rootCluster, f.clusters)
	}
	if ext[2] == 0x28 || ext[2] == 0x29 {
		f.serial = le.Uint32(ext[3:])
		if ext[2] == 0x29 {
			if f.label = strings.TrimRight(shortText(ext[7:18]), " "); f.label == "NO NAME" {
				f.label = ""
			}
		}
	}
	return nil
}

// Info describes the volume.
func (f *FS) Info() diskfs.Info {
	info := diskfs.Info{Type: typeName, Label: f.label, BlockSize: f.clusterSize, Size: f.size, Free: -1}
	if f.serial != 0 {
		info.UUID = fmt.Sprintf("%04X-%04X", f.serial>>16, f.serial&0xffff)
	}
	return info
}

// Root is the root directory's inode number.
func (f *FS) Root() uint64 { return rootIno }

// Inode reads the entry that the number is the place of.
func (f *FS) Inode(ino uint64) (diskfs.Inode, error) {
	n, err := f.inode(ino)
	if err == nil {
		err = n.measure()
	}
	if err != nil {
		return nil, err
	}
	return n, nil
}

func (f *FS) inode(ino uint64) (*inode, error) {
	if ino == rootIno {
		n := &inode{fs: f, dir: true}
		if f.bits == 32 {
			n.chain = newChain(f, f.rootCluster, maxDirectory)
		}
		epoch := time.Unix(0, 0).UTC() // as Linux has it: no entry records the root's times
		n.stat = diskfs.Stat{Ino: ino, Mode: modeDir | 0o755, Nlink: 2, BlockSize: int32(f.clusterSize), Atime: epoch, Mtime: epoch, Ctime: epoch}
		return n, nil
	}
	if ino > uint64(f.size/entrySize) || int64(ino)*entrySize < f.rootStart {
		return nil, fmt.Errorf("fat: no entry %d: %w", ino, fs.ErrNotExist)
	}
	e := make([]byte, entrySize)
	if err := f.read(e, int64(ino)*entrySize); err != nil {
		return nil, err
	}
	if !isFile(e) {
		return nil, fmt.Errorf("fat: entry %d is not in use: %w", ino, fs.ErrNotExist)
	}
	return newInode(f, ino, e), nil
}

// read fills p from the volume.
func (f *FS) read(p []byte, off int64) error {
	return diskfs.ReadWithin(typeName, f.r, f.size, p, off)
}

func (f *FS) valid(cluster uint32) bool { return cluster >= 2 && cluster-2 < f.clusters }

// clusterStart gives the place of a valid cluster.
func (f *FS) clusterStart(cluster uint32) int64 {
	return f.dataStart + int64(cluster-2)*f.clusterSize
}

// next gives the table's entry of a valid cluster; last is true at a chain's end.
func (f *FS) next(cluster uint32) (next uint32, last bool, err error) {
	var b [4]byte
	switch f.bits {
	case 12:
		err = f.readTable(b[:2], int64(cluster)+int64(cluster)/2)
		v := le.Uint16(b[:])
		if cluster&1 != 0 {
			v >>= 4
		}
		next = uint32(v & 0xfff)
		last = next >= 0xff8
	case 16:
		err = f.readTable(b[:2], int64(cluster)*2)
		next = uint32(le.Uint16(b[:]))
		last = next >= 0xfff8
	default:
		err = f.readTable(b[:], int64(cluster)*4)
		next = le.Uint32(b[:]) & 0x0fffffff
		last = next >= 0x0ffffff8
	}
	if err == nil && !last && !f.valid(next) {
		err = corrupt(fmt.Sprintf("table entry %d", cluster), "next cluster %d of %d", next, f.clusters)
	}
	return next, last, err
}

// readTable reads from the table through chunks kept in memory.
func (f *FS) readTable(p []byte, off int64) error {
	for len(p) > 0 {
		at := off / tableChunk * tableChunk
		f.mu.Lock()
		chunk, ok := f.table[at]
		f.mu.Unlock()
		if !ok {
			if off >= f.tableSize {
				return corrupt("table", "byte %d of %d", off, f.tableSize)
			}
			chunk = make([]byte, min(tableChunk, f.tableSize-at))
			if err := f.read(chunk, f.tableStart+at); err != nil {
				return err
			}
			f.mu.Lock()
			if len(f.table) >= f.chunks {
				clear(f.table)
			}
			f.table[at] = chunk
			f.mu.Unlock()
		}
		n := copy(p, chunk[min(off-at, int64(len(chunk))):])
		if n == 0 {
			return corrupt("table", "byte %d of %d", off, f.tableSize)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

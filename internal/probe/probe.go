// Package probe recognises what is written on a disk: file systems, members of RAID
// arrays and volume groups, encrypted volumes, swap space and partition tables.
//
// # Method
//
// The list of formats, their order and their names ("ext4", "linux_raid_member", …)
// are those of libblkid (util-linux), so that Varve and the operating system call a
// disk the same. The rules are:
//
//   - Containers (RAID members, volume managers, encryption, caches) come before file
//     systems. The first member of an array often begins like the file system on the
//     array; read by itself it gives wrong data without any error.
//   - Containers are also searched at the end of the device, where md 0.90 and 1.0,
//     DRBD and the RAIDs of firmware keep their metadata. Metadata inside a
//     partition belongs to the partition, not to the disk that ends with it.
//   - Containers come before partition tables, for the same reason. Partition tables
//     come before file systems: what is left of an older file system stands outside
//     of every partition.
//   - A signature shorter than eight bytes is not enough. A second field or the
//     checksum has to agree. A checksum that is wrong where everything else agrees
//     makes the signature Damaged; an undamaged file system is preferred to it.
//   - Copies of a superblock in the middle or at the end of a device count only where
//     nothing else is found: they outlive a new file system at the start.
//
// Probing reads about 500 KiB, and a signature promises nothing about the rest
// of the volume. The package imports nothing of Varve.
package probe

import (
	"errors"
	"fmt"
	"io"
)

// ErrNotRecognised means that there is no known signature. The error that wraps it
// says what stands where signatures do.
var ErrNotRecognised = errors.New("not recognised")

// Usage is what a signature is for.
type Usage string

// Usages, after libblkid.
const (
	RAID       Usage = "raid"       // a member of something that spans devices
	Crypto     Usage = "crypto"     // encrypted or verified content
	FileSystem Usage = "filesystem" // files can be read once it is mounted
	Other      Usage = "other"      // swap space, caches, journals, object stores
)

// Signature is what was recognised.
type Signature struct {
	Type    string // in libblkid's words: "ext4", "LVM2_member", "crypto_LUKS", …
	Usage   Usage
	Version string
	// UUID identifies the file system, the array or the pool, as blkid prints it;
	// empty where the format has none.
	UUID string
	// MemberUUID identifies this device among the members of UUID.
	MemberUUID string
	Label      string
	// Damaged says what contradicts the signature, such as a wrong checksum. It is
	// empty for a good one.
	Damaged string
	// Array describes a member of an array, nil for everything else.
	Array *Array
}

// Probe recognises what a whole disk or disk image of size bytes holds. It does not
// look for partition tables: see ReadContents. A device without a known signature is
// ErrNotRecognised. Errors of r are returned unchanged.
func Probe(r io.ReaderAt, size int64) (*Signature, error) {
	p := newProber(r, size)
	p.whole = true
	return p.signature()
}

// ProbeVolume recognises what a partition or a logical volume holds. It differs from
// Probe in that it does not look for the RAIDs of firmware, which use whole disks only.
func ProbeVolume(r io.ReaderAt, size int64) (*Signature, error) {
	return newProber(r, size).signature()
}

// finder looks for one format. It returns nil if the format is not there.
type finder func(*prober) *Signature

// Type is the Type of what Probe recognises.
func Type(r io.ReaderAt, size int64) (string, error) {
	s, err := Probe(r, size)
	if err != nil {
		return "", err
	}
	return s.Type, nil
}

func (p *prober) signature() (*Signature, error) {
	for _, list := range [][]finder{containers, fileSystems, remains} {
		if s := p.find(list); s != nil || p.err != nil {
			return s, p.err
		}
	}
	return nil, fmt.Errorf("%w: %s", ErrNotRecognised, p.describe())
}

// find gives the first undamaged signature of a list, or else the first damaged one.
// Damage does not demote a container: its content cannot be read without it.
func (p *prober) find(list []finder) *Signature {
	var damaged *Signature
	for _, f := range list {
		s := f(p)
		switch {
		case p.err != nil:
			return nil
		case s == nil:
		case s.Damaged == "" || s.Usage == RAID || s.Usage == Crypto:
			return s
		case damaged == nil:
			damaged = s
		}
	}
	return damaged
}

// containers, in libblkid's order. ZFS stands among libblkid's file systems; it is here
// because a pool's members cannot be read one by one.
var containers = []finder{
	findMD, findDDF, findIMSM, findLSI, findVIA, findSilicon, findNVIDIA, findPromise,
	findHighPoint45x, findHighPoint37x, findAdaptec, findJMicron, findLDM,
	findBcache, findBlueStore, findDRBD, findDRBDManage, findDRBDProxy,
	findLVM2, findLVM1, findSnapshotCOW, findVerity, findIntegrity, findLUKS,
	findVMFSVolume, findUBI, findVDO, findStratis, findBitLocker, findFileVault, findZFS,
}

// fileSystems, in libblkid's order.
var fileSystems = []finder{
	findBcachefs, findFAT, findSuspend, findSwap, findXFS, findXFSLog, findEXFS, findExt,
	findReiserfs, findReiser4, findJFS, findUDF, findISO9660, findHFSPlus, findHFS,
	findUFS, findHPFS, findSysV, findXenix, findNTFS, findReFS, findCramfs, findRomfs,
	findScoutFS, findMinix, findGFS, findOCFS, findOCFS2, findOracleASM, findVxFS,
	findSquashfs, findNSS, findBtrfs, findUBIFS, findBFS, findVMFS, findBeFS, findNILFS2,
	findExFAT, findF2FS, findMpool, findAPFS, findZonefs, findEROFS,
}

// remains are copies of superblocks away from the start.
var remains = []finder{findZFSAtEnd, findLUKSCopy, findBcachefsCopy, findNILFS2Copy}

// Contents is what stands on a disk.
type Contents struct {
	// Signature is what the whole disk holds, nil if that is a partition table or
	// nothing known.
	Signature *Signature
	// Table is the partition table, nil if the disk has none.
	Table *Table
	// Volumes are the signatures in Table.Partitions, in the same order; nil stands
	// for partitions without any.
	Volumes []*Signature
}

// Empty reports whether there is no known signature at all.
func (c *Contents) Empty() bool { return c.Signature == nil && c.Table == nil }

// ReadContents recognises what stands on a disk and in its partitions. A disk without
// a known signature is no error. A partition table that cannot be used at all is a
// *TableError.
func ReadContents(r io.ReaderAt, size int64) (*Contents, error) {
	p := newProber(r, size)
	p.whole = true
	c := &Contents{}
	table, err := p.table()
	if c.Signature = p.find(containers); c.Signature == nil && p.err == nil {
		if err != nil {
			return nil, err
		}
		if c.Table = table; table == nil || table.Foreign || len(table.Partitions) == 0 && table.Scheme == "mbr" {
			if c.Signature, err = p.signature(); err == nil {
				c.Table = nil
			} else if !errors.Is(err, ErrNotRecognised) {
				return nil, err
			}
		}
	}
	if p.err != nil {
		return nil, p.err
	}
	if c.Table == nil {
		return c, nil
	}
	for _, part := range c.Table.Partitions {
		s, err := ProbeVolume(io.NewSectionReader(r, part.Start, part.Length), part.Length)
		if err != nil && !errors.Is(err, ErrNotRecognised) {
			return nil, err
		}
		c.Volumes = append(c.Volumes, s)
	}
	return c, nil
}

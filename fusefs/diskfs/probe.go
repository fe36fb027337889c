package diskfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Probe names what a volume holds by its signature, in the words of blkid: "ext4", "xfs",
// "btrfs", "ntfs", "vfat", "LVM2_member", "crypto_LUKS", "swap", … It reads a few
// KiB. The signature promises nothing about the rest of the volume.
//
// A volume without any signature known here is ErrNotRecognised; the error says
// what stands where signatures do. Errors of r come back as they are.
func Probe(r io.ReaderAt, size int64) (string, error) {
	p := &prober{r: r, size: size}
	for _, s := range signatures {
		if p.matches(s) {
			return s.name, p.err
		}
	}
	for _, special := range []func(*prober) string{probeExt, probeFAT, probeLVM2, probeSwap, probeMD, probeZFS} {
		if name := special(p); name != "" || p.err != nil {
			return name, p.err
		}
	}
	if p.err != nil {
		return "", p.err
	}
	return "", fmt.Errorf("%w: %s", ErrNotRecognised, p.describe())
}

// signature is a magic number at a fixed place.
type signature struct {
	name  string
	at    int64
	magic string
}

// signatures, those first that stand before others' boot sectors. Sources: the
// formats' own documentation, as gathered in util-linux's libblkid.
var signatures = []signature{
	{"crypto_LUKS", 0, "LUKS\xba\xbe"},
	{"BitLocker", 3, "-FVE-FS-"},
	{"xfs", 0, "XFSB"},
	{"squashfs", 0, "hsqs"},
	{"squashfs", 0, "sqsh"},
	{"cramfs", 0, "\x45\x3d\xcd\x28"},
	{"romfs", 0, "-rom1fs-"},
	{"ceph_bluestore", 0, "bluestore block device"},
	{"vdo", 0, "dmvdo001"},
	{"ntfs", 3, "NTFS    "},
	{"exfat", 3, "EXFAT   "},
	{"ReFS", 3, "ReFS\x00\x00\x00\x00"},
	{"apfs", 32, "NXSB"},
	{"f2fs", 1024, "\x10\x20\xf5\xf2"},
	{"erofs", 1024, "\xe2\xe1\xf5\xe0"},
	{"hfsplus", 1024, "H+\x00\x04"},
	{"hfsplus", 1024, "HX\x00\x05"},
	{"bcachefs", 4096 + 24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"},
	{"bcachefs", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{"nilfs2", 1024 + 6, "\x34\x34"},
	{"ufs", 8192 + 0x55c, "\x54\x19\x01\x00"},
	{"ufs", 65536 + 0x55c, "\x19\x01\x54\x19"},
	{"jfs", 32768, "JFS1"},
	{"iso9660", 32769, "CD001"},
	{"udf", 32769, "BEA01"},
	{"btrfs", 65536 + 64, "_BHRfS_M"},
	{"reiserfs", 65536 + 52, "ReIsErFs"},
	{"reiserfs", 65536 + 52, "ReIsEr2Fs"},
	{"reiserfs", 65536 + 52, "ReIsEr3Fs"},
	{"reiser4", 65536, "ReIsEr4"},
	{"gfs2", 65536, "\x01\x16\x19\x70\x00\x00\x00\x01"},
	{"ocfs2", 8192, "OCFSV2"},
}

// prober reads pieces of a volume; what lies beyond its end reads as zeroes.
type prober struct {
	r    io.ReaderAt
	size int64
	head []byte // the first bytes, in one read
	err  error
}

const probeHead = 72 << 10

// bytes gives n bytes at off.
func (p *prober) bytes(off int64, n int) []byte {
	if p.head == nil {
		p.head = make([]byte, probeHead)
		p.fill(p.head, 0)
	}
	if off >= 0 && off+int64(n) <= probeHead {
		return p.head[off : off+int64(n)]
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

func (p *prober) matches(s signature) bool {
	return string(p.bytes(s.at, len(s.magic))) == s.magic
}

// probeExt tells the three apart by their features, as libblkid.
func probeExt(p *prober) string {
	sb := p.bytes(1024, 0x68)
	if binary.LittleEndian.Uint16(sb[0x38:]) != 0xef53 {
		return ""
	}
	compat, incompat, ro := binary.LittleEndian.Uint32(sb[0x5c:]), binary.LittleEndian.Uint32(sb[0x60:]), binary.LittleEndian.Uint32(sb[0x64:])
	const journalDev, ext3Incompat, ext3RO, hasJournal = 0x8, 0x16, 0x7, 0x4
	switch {
	case incompat&journalDev != 0:
		return "jbd"
	case incompat&^ext3Incompat != 0 || ro&^ext3RO != 0:
		return "ext4"
	case compat&hasJournal != 0:
		return "ext3"
	}
	return "ext2"
}

// probeFAT looks for a boot sector with the parameters of a FAT volume.
func probeFAT(p *prober) string {
	b := p.bytes(0, 512)
	sectorSize, cluster := binary.LittleEndian.Uint16(b[11:]), b[13]
	switch {
	case b[510] != 0x55 || b[511] != 0xaa,
		b[0] != 0xeb && b[0] != 0xe9,
		sectorSize < 512 || sectorSize > 4096 || sectorSize&(sectorSize-1) != 0,
		cluster == 0 || cluster&(cluster-1) != 0,
		binary.LittleEndian.Uint16(b[14:]) == 0, // reserved sectors
		b[16] == 0 || b[16] > 2,                 // tables
		b[21] != 0xf0 && b[21] < 0xf8:           // medium
		return ""
	}
	return "vfat"
}

// probeLVM2 looks for a label in the first four sectors.
func probeLVM2(p *prober) string {
	for sector := range int64(4) {
		b := p.bytes(sector*512, 32)
		if string(b[:8]) == "LABELONE" && string(b[24:]) == "LVM2 001" {
			return "LVM2_member"
		}
	}
	return ""
}

// probeSwap looks at the end of the first page, for every size of page.
func probeSwap(p *prober) string {
	for _, page := range []int64{4096, 8192, 16384, 65536} {
		switch string(p.bytes(page-10, 10)) {
		case "SWAPSPACE2", "SWAP-SPACE":
			return "swap"
		case "S1SUSPEND\x00", "S2SUSPEND\x00", "ULSUSPEND\x00", "LINHIB0001":
			return "swsuspend"
		}
	}
	return ""
}

// probeMD looks for the superblocks of Linux software RAID: at the start (1.1), 4 KiB
// on (1.2), and near the end (1.0 and 0.90).
func probeMD(p *prober) string {
	const kib64 = 64 << 10
	for _, at := range []int64{0, 4096, (p.size/512 - 16) &^ 7 * 512, p.size&^(kib64-1) - kib64} {
		if at >= 0 && bytes.Equal(p.bytes(at, 4), []byte{0xfc, 0x4e, 0x2b, 0xa9}) {
			return "linux_raid_member"
		}
	}
	return ""
}

// probeZFS looks for an uberblock in the first label's ring, in either byte order.
func probeZFS(p *prober) string {
	ring := p.bytes(128<<10, 128<<10)
	for at := 0; at < len(ring); at += 1024 {
		if v := ring[at : at+8]; binary.LittleEndian.Uint64(v) == 0x00bab10c || binary.BigEndian.Uint64(v) == 0x00bab10c {
			return "zfs_member"
		}
	}
	return ""
}

// describe says what stands in the places where most signatures do.
func (p *prober) describe() string {
	if p.size == 0 {
		return "the volume is empty"
	}
	var found []string
	for _, at := range []int64{0, 510, 1024, 1080, 4096, 32768, 65536} {
		if b := p.bytes(at, 8); !bytes.Equal(b, make([]byte, 8)) {
			found = append(found, fmt.Sprintf("% x (%q) at byte %d", b, b, at))
		}
	}
	if len(found) == 0 {
		return "there are only zeroes where signatures stand"
	}
	return "there is " + strings.Join(found, ", ")
}

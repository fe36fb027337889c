package diskfs

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// MBR: four entries of 16 bytes at byte 446 of the first sector, with start and
// length in sectors. An extended partition holds a chain of such sectors, each with one
// logical partition and a link to the next (relative to the extended partition).
const (
	mbrEntries    = 446
	mbrEntrySize  = 16
	mbrSectorSize = 512
	mbrProtective = 0xee
)

type mbrEntry struct {
	boot, typ     byte
	start, length int64 // sectors
}

func (e mbrEntry) extended() bool { return e.typ == 0x05 || e.typ == 0x0f || e.typ == 0x85 }

// readMBREntries gives nil where the sector carries no table.
func readMBREntries(p *prober, sector int64) []mbrEntry {
	b := p.bytes(sector*mbrSectorSize, mbrSectorSize)
	if b[510] != 0x55 || b[511] != 0xaa {
		return nil
	}
	entries := make([]mbrEntry, 4)
	for i := range entries {
		e := b[mbrEntries+i*mbrEntrySize:]
		entries[i] = mbrEntry{
			boot: e[0], typ: e[4],
			start:  int64(binary.LittleEndian.Uint32(e[8:])),
			length: int64(binary.LittleEndian.Uint32(e[12:])),
		}
	}
	return entries
}

// readMBR gives nil where the first sector is no partition table: boot sectors of
// file systems have the same mark, and other things where entries would be.
func readMBR(p *prober) (*Table, error) {
	entries := readMBREntries(p, 0)
	if entries == nil || strings.HasPrefix(string(p.bytes(3, 8)), "NTFS") || probeFAT(p) != "" ||
		string(p.bytes(3, 8)) == "EXFAT   " || string(p.bytes(32769, 5)) == "CD001" {
		return nil, nil
	}
	t := &Table{Scheme: "mbr", SectorSize: mbrSectorSize}
	sectors := p.size / mbrSectorSize
	for i, e := range entries {
		switch {
		case e.boot&0x7f != 0:
			return nil, nil
		case e.typ == 0 || e.length == 0:
			continue
		case e.typ == mbrProtective:
			return nil, corruptTable("gpt", "the protective MBR is there, but neither table of it")
		case e.start == 0 || e.start >= sectors:
			return nil, corruptTable("mbr", "partition %d begins at sector %d of %d; is the image cut short?", i+1, e.start, sectors)
		}
		if e.extended() {
			if err := readLogical(p, t, e, sectors); err != nil {
				return nil, err
			}
			continue
		}
		part, err := mbrPartition(i+1, e, sectors)
		if err != nil {
			return nil, err
		}
		t.Partitions = append(t.Partitions, part)
	}
	if len(t.Partitions) == 0 {
		return nil, nil
	}
	return t, nil
}

func mbrPartition(number int, e mbrEntry, sectors int64) (Partition, error) {
	if e.start <= 0 || e.length <= 0 || e.start >= sectors || e.length > sectors-e.start {
		return Partition{}, corruptTable("mbr", "partition %d: %d sectors at %d of %d; is the image cut short?", number, e.length, e.start, sectors)
	}
	return Partition{
		Number: number,
		Start:  e.start * mbrSectorSize,
		Length: e.length * mbrSectorSize,
		Type:   fmt.Sprintf("0x%02x", e.typ),
	}, nil
}

// readLogical follows the chain in an extended partition. Links must not leave it, and
// a chain has an end.
func readLogical(p *prober, t *Table, ext mbrEntry, sectors int64) error {
	seen := map[int64]bool{}
	number := 5
	for _, have := range t.Partitions {
		number = max(number, have.Number+1)
	}
	for at := ext.start; ; {
		if seen[at] || len(seen) == maxLogical {
			return corruptTable("mbr", "the chain of logical partitions has no end")
		}
		seen[at] = true
		entries := readMBREntries(p, at)
		if entries == nil {
			return corruptTable("mbr", "no table of logical partitions in sector %d", at)
		}
		next := int64(0)
		for _, e := range entries {
			switch {
			case e.length == 0:
			case e.extended():
				if next == 0 {
					next = ext.start + e.start
				}
			case e.typ != 0:
				e.start += at
				part, err := mbrPartition(number, e, sectors)
				if err != nil {
					return err
				}
				t.Partitions = append(t.Partitions, part)
				number++
			}
		}
		if next == 0 {
			return nil
		}
		if next >= ext.start+ext.length || next >= sectors {
			return corruptTable("mbr", "a link to sector %d leaves the extended partition", next)
		}
		at = next
	}
}

package probe

import (
	"fmt"
	"slices"
)

// MBR: four entries of 16 bytes at byte 446 of the first sector, with start and
// length in sectors. An extended partition holds a chain of such sectors, each with one
// logical partition and a link to the next (relative to the extended partition).
const (
	mbrID         = 440
	mbrEntries    = 446
	mbrEntrySize  = 16
	mbrSectorSize = 512
	mbrProtective = 0xee
	mbrLDM        = 0x42
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
			start:  int64(le.Uint32(e[8:])),
			length: int64(le.Uint32(e[12:])),
		}
	}
	return entries
}

// readMBR gives nil where the first sector is no partition table: boot sectors of
// file systems have the same mark, and other things where entries would be. A table
// without any good partition is one only if nothing else is on the disk: see ReadContents.
func readMBR(p *prober) (*Table, error) {
	entries := readMBREntries(p, 0)
	if entries == nil || findNTFS(p) != nil || findFAT(p) != nil || findExFAT(p) != nil || p.has(discAt+1, "CD001") {
		return nil, nil
	}
	t := &Table{Scheme: "mbr", SectorSize: mbrSectorSize}
	if id := le.Uint32(p.bytes(mbrID, 4)); id != 0 {
		t.ID = fmt.Sprintf("%08x", id)
	}
	sectors, protected := p.size/mbrSectorSize, false
	for i, e := range entries {
		switch {
		case e.boot&0x7f != 0:
			return nil, nil
		case e.typ == 0 || e.length == 0:
		case e.typ == mbrProtective:
			protected = true
		case e.extended():
			if e.start == 0 || e.start >= sectors {
				t.bad(i+1, e, sectors)
				continue
			}
			readLogical(p, t, e, sectors)
		default:
			t.add(i+1, e, sectors)
		}
	}
	switch {
	case protected && len(t.Partitions) == 0:
		return nil, tableError("gpt", "the protective MBR is there, but neither copy of the table")
	case protected:
		t.Reason = "the table is a hybrid of MBR and GPT, and the GPT is missing"
	case len(t.Partitions) == 0 && len(t.Bad) == 0:
		return nil, nil
	}
	return t, nil
}

func (t *Table) add(number int, e mbrEntry, sectors int64) {
	if e.start <= 0 || e.length <= 0 || e.start >= sectors || e.length > sectors-e.start {
		t.bad(number, e, sectors)
		return
	}
	t.Partitions = append(t.Partitions, Partition{
		Number: number,
		Start:  e.start * mbrSectorSize,
		Length: e.length * mbrSectorSize,
		Type:   fmt.Sprintf("0x%02x", e.typ),
	})
}

func (t *Table) bad(number int, e mbrEntry, sectors int64) {
	what := fmt.Sprintf("it spans the sectors %d to %d of a disk of %d", e.start, e.start+e.length-1, sectors)
	t.Bad = append(t.Bad, BadPartition{Number: number, Type: fmt.Sprintf("0x%02x", e.typ), What: what})
}

// readLogical follows the chain in an extended partition. Links must not leave it, and
// a chain has an end. What was found before a broken link stands.
func readLogical(p *prober, t *Table, ext mbrEntry, sectors int64) {
	number := 5
	for _, have := range t.Partitions {
		number = max(number, have.Number+1)
	}
	for _, have := range t.Bad {
		number = max(number, have.Number+1)
	}
	broken := func(format string, args ...any) {
		t.Bad = append(t.Bad, BadPartition{
			Number: number, Type: fmt.Sprintf("0x%02x", ext.typ),
			What: "the chain of logical partitions breaks before it: " + fmt.Sprintf(format, args...),
		})
	}
	var seen []int64
	for at := ext.start; ; {
		if slices.Contains(seen, at) || len(seen) == maxLogical {
			broken("it has no end")
			return
		}
		seen = append(seen, at)
		entries := readMBREntries(p, at)
		if entries == nil {
			broken("sector %d holds no table", at)
			return
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
				t.add(number, e, sectors)
				number++
			}
		}
		if next == 0 {
			return
		}
		if next >= ext.start+ext.length || next >= sectors {
			broken("a link to sector %d leaves the extended partition", next)
			return
		}
		at = next
	}
}

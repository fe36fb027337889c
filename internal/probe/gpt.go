package probe

import (
	"fmt"
	"hash/crc32"

	"github.com/varve-io/varve/internal/zero"
)

// GPT (UEFI specification, 5.3): a header in sector 1 and at the disk's last sector,
// and an array of entries, all little-endian and with CRC-32.
const (
	gptSignature  = "EFI PART"
	gptHeaderSize = 92
	gptEntrySize  = 128
)

// readGPT gives nil where there is no protective MBR: then, as for the kernel, a table is
// a leftover of the disk's earlier use.
func readGPT(p *prober) (*Table, error) {
	protected := false
	for _, e := range readMBREntries(p, 0) {
		protected = protected || e.typ == mbrProtective
	}
	if !protected {
		return nil, nil
	}
	var first error
	for _, sector := range []int64{512, 4096} {
		last := p.size/sector - 1
		for _, lba := range []int64{1, last} {
			if lba < 1 || !p.has(lba*sector, gptSignature) {
				continue
			}
			t, err := readGPTAt(p, sector, lba)
			if err == nil {
				if t.FromBackup = lba != 1; t.FromBackup {
					t.Reason = "the primary table is missing or of other sectors"
					if first != nil {
						t.Reason = first.Error()
					}
				}
				return t, nil
			}
			if first == nil {
				first = err
			}
		}
	}
	return nil, first
}

func readGPTAt(p *prober, sector, lba int64) (*Table, error) {
	h := p.bytes(lba*sector, int(sector))
	headerSize := int64(le.Uint32(h[12:]))
	if headerSize < gptHeaderSize || headerSize > sector {
		return nil, tableError("gpt", "header of %d bytes", headerSize)
	}
	if got, want := crc32.ChecksumIEEE(cleared(h[:headerSize], 16, 4, 0)), le.Uint32(h[16:]); got != want {
		return nil, tableError("gpt", "header checksum %08x, computed %08x", want, got)
	}
	sectors := uint64(p.size / sector)
	firstUsable, lastUsable := le.Uint64(h[40:]), le.Uint64(h[48:])
	array, count, entrySize := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	switch {
	case le.Uint64(h[24:]) != uint64(lba):
		return nil, tableError("gpt", "header of sector %d in sector %d", le.Uint64(h[24:]), lba)
	case firstUsable > lastUsable && lastUsable != firstUsable-1:
		return nil, tableError("gpt", "usable sectors %d to %d", firstUsable, lastUsable)
	case count > maxGPTEntries || entrySize < gptEntrySize || entrySize > 4096 || entrySize%8 != 0:
		return nil, tableError("gpt", "%d entries of %d bytes", count, entrySize)
	}
	length := int64(count) * int64(entrySize)
	if array >= sectors || length > p.size-int64(array)*sector {
		return nil, tableError("gpt", "entries at sector %d of %d", array, sectors)
	}
	entries := p.bytes(int64(array)*sector, int(length))
	if got, want := crc32.ChecksumIEEE(entries), le.Uint32(h[88:]); got != want {
		return nil, tableError("gpt", "entries' checksum %08x, computed %08x", want, got)
	}
	t := &Table{Scheme: "gpt", ID: guid(h[56:]), SectorSize: int(sector)}
	if lastUsable >= sectors {
		t.Reason = fmt.Sprintf("the table is for a disk of at least %d sectors, and this one has %d: is the image cut short?", lastUsable+1, sectors)
	}
	for i := range int(count) {
		e := entries[i*int(entrySize):][:gptEntrySize]
		if zero.Only(e[:16]) {
			continue
		}
		start, end := le.Uint64(e[32:]), le.Uint64(e[40:])
		if start > end || end >= sectors || start == 0 {
			what := fmt.Sprintf("it spans the sectors %d to %d of a disk of %d", start, end, sectors)
			t.Bad = append(t.Bad, BadPartition{Number: i + 1, Type: guid(e[:16]), What: what})
			continue
		}
		t.Partitions = append(t.Partitions, Partition{
			Number: i + 1,
			Start:  int64(start) * sector,
			Length: int64(end-start+1) * sector,
			Type:   guid(e[:16]),
			UUID:   guid(e[16:32]),
			Name:   text16(e[56:gptEntrySize], le),
		})
	}
	return t, nil
}

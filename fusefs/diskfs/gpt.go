package diskfs

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"unicode/utf16"
)

// GPT (UEFI specification, 5.3): a header in sector 1 and at the disk's last sector,
// and an array of entries, all little-endian and with CRC-32.
const (
	gptSignature  = "EFI PART"
	gptHeaderSize = 92
	gptEntrySize  = 128
)

// readGPT gives nil where there is no header at all, or no protective MBR: then, as for
// the kernel, a table is a leftover of the disk's earlier use.
func readGPT(p *prober) (*Table, error) {
	if !protected(readMBREntries(p, 0)) {
		return nil, nil
	}
	var first error
	for _, sector := range []int64{512, 4096} {
		last := p.size/sector - 1
		for _, lba := range []int64{1, last} {
			if lba < 1 || string(p.bytes(lba*sector, len(gptSignature))) != gptSignature {
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

func protected(entries []mbrEntry) bool {
	for _, e := range entries {
		if e.typ == mbrProtective {
			return true
		}
	}
	return false
}

func readGPTAt(p *prober, sector, lba int64) (*Table, error) {
	h := p.bytes(lba*sector, int(sector))
	le := binary.LittleEndian
	headerSize := int64(le.Uint32(h[12:]))
	if headerSize < gptHeaderSize || headerSize > sector {
		return nil, corruptTable("gpt", "header of %d bytes", headerSize)
	}
	sum := append([]byte(nil), h[:headerSize]...)
	clear(sum[16:20])
	if got, want := crc32.ChecksumIEEE(sum), le.Uint32(h[16:]); got != want {
		return nil, corruptTable("gpt", "header checksum %08x, computed %08x", want, got)
	}
	sectors := uint64(p.size / sector)
	firstUsable, lastUsable := le.Uint64(h[40:]), le.Uint64(h[48:])
	array, count, entrySize := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	switch {
	case le.Uint64(h[24:]) != uint64(lba):
		return nil, corruptTable("gpt", "header of sector %d in sector %d", le.Uint64(h[24:]), lba)
	case firstUsable > lastUsable || lastUsable >= sectors:
		return nil, corruptTable("gpt", "usable sectors %d to %d of %d; is the image cut short?", firstUsable, lastUsable, sectors)
	case count > maxGPTEntries || entrySize < gptEntrySize || entrySize > 4096 || entrySize%8 != 0:
		return nil, corruptTable("gpt", "%d entries of %d bytes", count, entrySize)
	}
	length := int64(count) * int64(entrySize)
	if array >= sectors || length > p.size-int64(array)*sector {
		return nil, corruptTable("gpt", "entries at sector %d of %d", array, sectors)
	}
	entries := p.bytes(int64(array)*sector, int(length))
	if got, want := crc32.ChecksumIEEE(entries), le.Uint32(h[88:]); got != want {
		return nil, corruptTable("gpt", "entries' checksum %08x, computed %08x", want, got)
	}
	t := &Table{Scheme: "gpt", SectorSize: int(sector)}
	for i := range int(count) {
		e := entries[i*int(entrySize):][:gptEntrySize]
		if [16]byte(e[:16]) == [16]byte{} {
			continue
		}
		start, end := le.Uint64(e[32:]), le.Uint64(e[40:])
		if start > end || end >= sectors || start == 0 {
			return nil, corruptTable("gpt", "partition %d: sectors %d to %d of %d", i+1, start, end, sectors)
		}
		t.Partitions = append(t.Partitions, Partition{
			Number: i + 1,
			Start:  int64(start) * sector,
			Length: int64(end-start+1) * sector,
			Type:   guid(e[:16]),
			UUID:   guid(e[16:32]),
			Name:   utf16Name(e[56:gptEntrySize]),
		})
	}
	return t, nil
}

// guid prints a GUID as the field does: the first three parts are little-endian.
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

func utf16Name(b []byte) string {
	var units []uint16
	for ; len(b) >= 2; b = b[2:] {
		u := binary.LittleEndian.Uint16(b)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}

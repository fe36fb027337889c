package probe

import (
	"errors"
	"fmt"
	"io"
	"slices"
)

// Table is a disk's partition table.
type Table struct {
	// Scheme is "gpt" or "mbr", or one whose partitions are not read: "mac", "sun", "sgi", …
	Scheme     string
	ID         string // the disk's GUID (GPT) or "1a2b3c4d" (MBR); empty where there is none
	SectorSize int    // bytes, that the table counts in
	// Partitions are those that lie within the disk, by number.
	Partitions []Partition
	// Bad are the entries that cannot be used, by number.
	Bad []BadPartition
	// FromBackup says that the primary GPT could not be used and the copy at the
	// disk's end stands here.
	FromBackup bool
	// Reason says why FromBackup is set, or what else is wrong with the table as a whole.
	Reason string
	// Foreign says that Varve does not read the partitions of this scheme.
	Foreign bool
}

// Partition is one partition. Start and Length lie within the disk.
type Partition struct {
	Number int    // as the kernel numbers it, from 1; logical ones from 5
	Start  int64  // bytes
	Length int64  // bytes
	Type   string // GPT: type GUID; MBR: "0x83"
	Name   string // GPT only
	UUID   string // GPT only
}

// BadPartition is an entry of a table that cannot be used.
type BadPartition struct {
	Number int
	Type   string
	What   string // what is wrong with it
}

// Dynamic reports whether the partition belongs to a dynamic disk of Windows (LDM) or to
// a storage pool: its volumes can lie on several disks, and begin anywhere in it.
func (p *Partition) Dynamic() bool {
	switch p.Type {
	case "0x42", "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "af9b60a0-1431-4f62-bc68-3311714a69ad", "e75caf8f-f680-4cee-afa3-b001e56efc2d":
		return true
	}
	return false
}

// TableError means that a disk has a partition table that cannot be used at all.
type TableError struct {
	Scheme string
	What   string
}

func (e *TableError) Error() string { return e.Scheme + ": partition table: " + e.What }

func tableError(scheme, format string, args ...any) error {
	return &TableError{Scheme: scheme, What: fmt.Sprintf(format, args...)}
}

// Limits of tables: the kernel reads no more either.
const (
	maxGPTEntries = 1024
	maxLogical    = 256
)

// Partitions reads the partition table of a disk: GPT (primary or, if that is damaged,
// backup; sectors of 512 and 4096 bytes) or MBR with extended partitions. Entries that
// cannot be used are named in Table.Bad. A disk without a table is ErrNotRecognised, one
// whose table cannot be used at all a *TableError.
//
// Containers can hold a partition table that is that of the array: use ReadContents
// where that matters.
func Partitions(r io.ReaderAt, size int64) (*Table, error) {
	p := newProber(r, size)
	p.whole = true
	table, err := p.table()
	if err == nil && table == nil {
		err = fmt.Errorf("%w: no partition table", ErrNotRecognised)
	}
	return table, err
}

// table gives nil where there is none.
func (p *prober) table() (*Table, error) {
	if !p.tableRead {
		p.tableRead = true
		p.partTable, p.tableErr = p.readTable()
	}
	return p.partTable, errors.Join(p.err, p.tableErr)
}

func (p *prober) readTable() (*Table, error) {
	if p.size < 512 {
		return nil, nil
	}
	if t := readForeignFirst(p); t != nil {
		return t, nil
	}
	t, err := readGPT(p)
	if t == nil && err == nil {
		t, err = readMBR(p)
	}
	if t == nil && err == nil {
		t = readForeign(p)
	}
	if t == nil || err != nil {
		return nil, err
	}
	slices.SortStableFunc(t.Partitions, func(a, b Partition) int { return a.Number - b.Number })
	slices.SortStableFunc(t.Bad, func(a, b BadPartition) int { return a.Number - b.Number })
	return t, nil
}

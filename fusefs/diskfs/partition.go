package diskfs

import (
	"fmt"
	"io"
	"slices"
)

// Table is a disk's partition table.
type Table struct {
	Scheme     string      // "gpt" or "mbr"
	SectorSize int         // bytes, that the table counts in
	Partitions []Partition // by number
	// FromBackup says that the primary GPT could not be used and the copy at the
	// disk's end stands here; Reason says why.
	FromBackup bool
	Reason     string
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

// Limits of tables: the kernel reads no more either.
const (
	maxGPTEntries = 1024
	maxLogical    = 256
)

// Partitions reads the partition table of a disk: GPT (primary or, if that is
// damaged, backup; sectors of 512 and 4096 bytes) or MBR with extended partitions.
// A disk without one is ErrNotRecognised. A table whose partitions reach beyond the disk or
// contradict each other is ErrCorrupt.
func Partitions(r io.ReaderAt, size int64) (*Table, error) {
	p := &prober{r: r, size: size}
	table, err := readGPT(p)
	if table == nil && err == nil {
		table, err = readMBR(p)
	}
	switch {
	case p.err != nil:
		return nil, p.err
	case err != nil:
		return nil, err
	case table == nil:
		return nil, fmt.Errorf("%w: no partition table", ErrNotRecognised)
	}
	slices.SortFunc(table.Partitions, func(a, b Partition) int { return a.Number - b.Number })
	return table, nil
}

func corruptTable(scheme, format string, args ...any) error {
	return &CorruptError{Type: scheme, Where: "partition table", What: fmt.Sprintf(format, args...)}
}

package xfs

import (
	"fmt"

	"github.com/varve-io/varve/internal/bytesize"
)

// The data of records is a series of operations ("Log Operations"): a header, then
// that many bytes. The operations of one transaction, which can be spread over records
// and mixed with those of others, bear its number; each carries a region of one of its
// items. A region cut by the end of a record continues in the next.
const (
	opHeaderSize = 12

	opStart     = 0x01
	opCommit    = 0x02
	opContinue  = 0x04 // continues in the next operation
	opContinued = 0x08 // continues the one before
	opEnd       = 0x10 // the last piece
	opUnmount   = 0x20

	clientTransaction = 0x69
	clientLog         = 0xaa

	transHeaderMagic = 0x5452414e // "TRAN"
	transHeaderSize  = 16
	maxRegions       = 257 // of one item: each second of a block's 128-byte chunks
)

// logItem is a change: its description, and the regions with the data.
type logItem struct {
	kind    uint16
	total   int
	regions [][]byte
}

type transaction struct {
	lsn    uint64 // of the record in which it begins
	header []byte
	items  []*logItem
	held   int // bytes, as the assembler counts them
}

const (
	// maxOpen and maxOpenBytes bound the memory for transactions that are not committed yet.
	// Linux begins a new one at 32 MiB, waits at 64, and writes a few at once.
	maxOpen      = 64 << 10
	maxOpenBytes = 1 << 30
	// opCost is what an operation takes in memory besides its data.
	opCost = 128
)

// assembler puts transactions together and hands over those that are committed, in
// the order of their commits.
type assembler struct {
	open   map[uint32]*transaction
	held   int // bytes of those
	limit  int // most bytes
	commit func(*transaction) error
}

func newAssembler(commit func(*transaction) error) *assembler {
	return &assembler{open: map[uint32]*transaction{}, limit: maxOpenBytes, commit: commit}
}

// add takes the operations of a record.
func (a *assembler) add(r record, data []byte) error {
	for range r.ops {
		if len(data) < opHeaderSize {
			break // the rest is padding
		}
		id, n := be32(data, 0), be32(data, 4)
		client, flags := data[8], data[9]
		data = data[opHeaderSize:]
		if client != clientTransaction && client != clientLog {
			return corrupt(sectorName(r.blk), "operation of client %#x", client)
		}
		if uint64(n) > uint64(len(data)) {
			return corrupt(sectorName(r.blk), "operation of %d bytes with %d left", n, len(data))
		}
		if err := a.operation(r, id, flags, data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

func (a *assembler) operation(r record, id uint32, flags byte, data []byte) error {
	t := a.open[id]
	if t == nil {
		// What is not of a known transaction began before the tail, or is padding.
		if flags&opStart == 0 {
			return nil
		}
		if len(a.open) == maxOpen {
			return unsupported("a log with more than %d unfinished transactions", maxOpen)
		}
		t = &transaction{lsn: r.lsn}
		a.open[id] = t
		return a.hold(t, opCost)
	}
	flags &^= opEnd
	if flags&opContinued != 0 {
		flags &^= opContinue
	}
	var err error
	switch flags {
	case 0, opContinue:
		if err = t.region(data); err == nil {
			err = a.hold(t, opCost+len(data))
		}
	case opContinued:
		if err = t.continued(data); err == nil {
			err = a.hold(t, len(data))
		}
	case opCommit:
		a.forget(id, t)
		err = a.commit(t)
	case opUnmount:
		a.forget(id, t)
	default:
		err = fmt.Errorf("operation flags %#x", flags)
	}
	if err != nil {
		return fmt.Errorf("%s: transaction %#x: %w", sectorName(r.blk), id, err)
	}
	return nil
}

// hold counts what an open transaction takes.
func (a *assembler) hold(t *transaction, n int) error {
	t.held += n
	if a.held += n; a.held > a.limit {
		return unsupported("a log with more than %s of unfinished transactions", bytesize.Format(int64(a.limit)))
	}
	return nil
}

func (a *assembler) forget(id uint32, t *transaction) {
	delete(a.open, id)
	a.held -= t.held
}

// region takes the next region of the transaction.
func (t *transaction) region(data []byte) error {
	if len(data) == 0 {
		return nil
	}
	if len(t.header) < transHeaderSize {
		if len(t.header) > 0 || len(data) > transHeaderSize || len(data) < 4 || le32(data, 0) != transHeaderMagic {
			return corrupt("log", "transaction without a header")
		}
		t.header = append(t.header, data...)
		return nil
	}
	data = append([]byte(nil), data...)
	if n := len(t.items); n > 0 && len(t.items[n-1].regions) < t.items[n-1].total {
		t.items[n-1].regions = append(t.items[n-1].regions, data)
		return nil
	}
	if len(data) < 4 {
		return corrupt("log", "item of %d bytes", len(data))
	}
	it := &logItem{kind: le16(data, 0), total: int(le16(data, 2)), regions: [][]byte{data}}
	if it.total == 0 || it.total > maxRegions {
		return corrupt("log", "item %s with %d regions", itemName(it.kind), it.total)
	}
	t.items = append(t.items, it)
	return nil
}

// continued takes the rest of a region.
func (t *transaction) continued(data []byte) error {
	if len(t.header) < transHeaderSize {
		if len(t.header)+len(data) > transHeaderSize {
			return corrupt("log", "transaction header of %d bytes", len(t.header)+len(data))
		}
		t.header = append(t.header, data...)
		return nil
	}
	if len(t.items) == 0 {
		if len(data) == 0 {
			return nil
		}
		return corrupt("log", "a region goes on that did not begin")
	}
	it := t.items[len(t.items)-1]
	last := len(it.regions) - 1
	it.regions[last] = append(it.regions[last], data...)
	return nil
}

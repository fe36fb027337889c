package xfs

import (
	"errors"
	"fmt"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// The log ("Journaling Log") is a ring of 512-byte sectors. Each sector begins with
// the cycle, the number of the pass over the ring in which it was written, or, where
// a record begins, with a magic number and then the cycle. So the head, where the next
// record would go, is where the cycle drops.
const (
	maxLogBytes = 2 << 30

	// Up to 8 records of up to 256 KiB are written at once, in any order; after the
	// head there may be gaps within that many sectors.
	maxRecordBytes   = 256 << 10
	inFlightRecords  = 8
	inFlightSectors  = inFlightRecords * maxRecordBytes / sector
	maxRecordSectors = maxRecordBytes/sector + maxRecordBytes/cycleDataBytes
)

// logRing reads the log of a file system.
type logRing struct {
	f     *FS
	start int64 // byte
	n     int   // sectors
}

// logEnds says what of the log is to be replayed: from sector tail to sector head,
// around the end of the ring, or nothing if it is clean.
type logEnds struct {
	tail, head int
	clean      bool
}

// openLog finds out whether the log is clean, and replays it if not.
func (f *FS) openLog(opt diskfs.Options) error {
	l, err := f.newLogRing()
	var ends logEnds
	if err == nil {
		ends, err = l.findEnds()
	}
	switch {
	case err == nil && ends.clean:
		f.logState = diskfs.LogClean
		return nil
	case opt.Stale:
		f.logState = diskfs.LogIgnored
		return nil
	case err == nil:
		err = l.replay(ends)
	}
	if errors.Is(err, diskfs.ErrCorrupt) || errors.Is(err, diskfs.ErrUnsupported) {
		return diskfs.DirtyLogError(err)
	}
	if err != nil {
		return err
	}
	f.logState = diskfs.LogReplayed
	return nil
}

func (f *FS) newLogRing() (*logRing, error) {
	sb := f.sb
	if sb.logStart == 0 {
		return nil, unsupported("an external log, whose state cannot be known,")
	}
	start, ok := sb.offset(sb.logStart, uint64(sb.logBlocks))
	size := int64(sb.logBlocks) << sb.blockLog
	if !ok || sb.logBlocks == 0 || size > maxLogBytes {
		return nil, corrupt("log", "%d blocks at block %#x", sb.logBlocks, sb.logStart)
	}
	return &logRing{f: f, start: start, n: int(size / sector)}, nil
}

// read reads count <= l.n sectors from blk on, around the end of the ring.
func (l *logRing) read(blk, count int) ([]byte, error) {
	buf := make([]byte, count*sector)
	first := min(count, l.n-blk)
	if err := l.f.dev.readAt(buf[:first*sector], l.start+int64(blk)*sector); err != nil {
		return nil, err
	}
	if first < count {
		if err := l.f.dev.readAt(buf[first*sector:], l.start); err != nil {
			return nil, err
		}
	}
	return buf, nil
}

func cycleOf(b []byte) uint32 {
	if be32(b, 0) == recordMagic {
		return be32(b, 4)
	}
	return be32(b, 0)
}

func (l *logRing) cycle(blk int) (uint32, error) {
	b, err := l.read(blk, 1)
	if err != nil {
		return 0, err
	}
	return cycleOf(b), nil
}

// scan gives the first of count sectors from blk on that has the given cycle, or -1.
func (l *logRing) scan(blk, count int, cycle uint32) (int, error) {
	const chunk = 512
	for done := 0; done < count; done += chunk {
		n := min(chunk, count-done)
		b, err := l.read(blk+done, n)
		if err != nil {
			return 0, err
		}
		for j := range n {
			if cycleOf(b[j*sector:]) == cycle {
				return blk + done + j, nil
			}
		}
	}
	return -1, nil
}

// transition gives the first sector of the given cycle in (lo, hi]; lo has another
// cycle and hi has it.
func (l *logRing) transition(lo, hi int, cycle uint32) (int, error) {
	for lo+1 < hi {
		mid := lo + (hi-lo)/2
		c, err := l.cycle(mid)
		if err != nil {
			return 0, err
		}
		if c == cycle {
			hi = mid
		} else {
			lo = mid
		}
	}
	return hi, nil
}

// findEnds finds the head by the cycles and the tail by the last record.
func (l *logRing) findEnds() (logEnds, error) {
	first, err := l.cycle(0)
	if err != nil {
		return logEnds{}, err
	}
	last, err := l.cycle(l.n - 1)
	if err != nil {
		return logEnds{}, err
	}
	if first == 0 {
		if last != 0 {
			return logEnds{}, corrupt("log", "it begins with zeroes and does not end with them")
		}
		return logEnds{clean: true}, nil // never written
	}
	head := l.n
	if first != last {
		if last != 0 && last != first-1 {
			return logEnds{}, corrupt("log", "cycle %d follows cycle %d", last, first)
		}
		if head, err = l.transition(0, l.n-1, last); err != nil {
			return logEnds{}, err
		}
	}
	// A record that says the volume was unmounted waits for all before it: if it
	// stands at the head, there are no gaps to look for.
	if rec, ok, err := l.lastRecord(head, maxRecordSectors); err != nil {
		return logEnds{}, err
	} else if ok && rec.end(l.n) == head%l.n {
		if clean, err := l.unmounted(rec); clean || err != nil {
			return logEnds{tail: head % l.n, head: head % l.n, clean: clean}, err
		}
	}
	if head, err = l.closeGaps(head, first, last); err != nil {
		return logEnds{}, err
	}
	return l.checkHead(head)
}

// closeGaps moves the head back to the first gap among the sectors that may have been
// in flight: one that still has the cycle before.
func (l *logRing) closeGaps(head int, first, last uint32) (int, error) {
	stale := last
	if first == last {
		stale = first - 1
	}
	window := min(inFlightSectors, l.n-1)
	begin := head - window
	if begin < 0 && last != 0 && last != first {
		// The window began at the end of the ring, one cycle earlier.
		gap, err := l.scan(l.n+begin, -begin, last-1)
		if err != nil || gap >= 0 {
			return gap, err
		}
	}
	begin = max(begin, 0)
	gap, err := l.scan(begin, head-begin, stale)
	if err != nil || gap >= 0 {
		return gap, err
	}
	return head, nil
}

// checkHead drops records before head that are not whole, and gives the ends of what
// is to be replayed.
func (l *logRing) checkHead(head int) (logEnds, error) {
	rec, ok, err := l.lastRecord(head, l.n)
	if err != nil {
		return logEnds{}, err
	}
	if ok && rec.end(l.n) != head%l.n {
		head = rec.blk // it does not end at the head: cut off, or followed by scraps
		rec, ok, err = l.lastRecord(head, l.n)
		if err != nil {
			return logEnds{}, err
		}
	}
	if !ok {
		return logEnds{}, corrupt("log", "no record before its head at sector %d", head)
	}
	// Records in flight can be torn. Go back over as many as there can be, but no
	// further than the tail, and believe them from there up to the first whose
	// checksum is wrong.
	first := head
	for tries := 0; ; tries++ {
		if tries > inFlightRecords*inFlightRecords {
			return logEnds{}, corrupt("log", "no whole record among those before its head at sector %d", first)
		}
		if rec.bad {
			rec.tail = rec.lsn // known by its place only; it is dropped below
		} else if rec.tailBlk() >= l.n {
			return logEnds{}, corrupt("log", "tail at sector %d of %d", rec.tailBlk(), l.n)
		}
		oldest := rec
		for n := 1; n < inFlightRecords && oldest.blk != rec.tailBlk(); n++ {
			prev, ok, err := l.lastRecord(oldest.blk, l.n)
			if err != nil {
				return logEnds{}, err
			}
			if !ok || prev.end(l.n) != oldest.blk {
				break
			}
			oldest = prev
		}
		bad, good, err := l.firstBad(oldest.blk, head%l.n)
		if err != nil {
			return logEnds{}, err
		}
		if bad < 0 {
			break
		}
		head = bad
		if good != nil {
			rec = *good
			continue
		}
		back := (first%l.n - bad + l.n) % l.n
		if rec, ok, err = l.lastRecord(bad, l.n-back-1); err != nil {
			return logEnds{}, err
		} else if !ok {
			return logEnds{}, corrupt("log", "no whole record before its head at sector %d", first)
		}
	}
	head %= l.n
	if rec.end(l.n) == head {
		if clean, err := l.unmounted(rec); clean || err != nil {
			return logEnds{tail: head, head: head, clean: clean}, err
		}
	}
	tail, err := l.checkTail(rec.tailBlk(), head)
	if err != nil {
		return logEnds{}, err
	}
	return logEnds{tail: tail, head: head, clean: tail == head}, nil
}

// firstBad checks records from blk to head. bad is where the first begins that is not
// whole, or -1; good is the last before it.
func (l *logRing) firstBad(blk, head int) (bad int, good *record, err error) {
	for seen := 0; ; {
		rec, err := l.record(blk)
		if err == nil && rec.sectors() <= l.n-seen {
			_, err = l.recordData(rec)
		}
		switch {
		case errors.Is(err, diskfs.ErrCorrupt), err == nil && rec.sectors() > l.n-seen:
			return blk, good, nil
		case err != nil:
			return 0, nil, err
		}
		seen += rec.sectors()
		good, blk = &rec, rec.end(l.n)
		if blk == head {
			return -1, good, nil
		}
	}
}

// checkTail gives the first whole record at or after blk. What the last whole record
// calls the tail can have been overwritten by records in flight, that were not
// finished: they begin at the head.
func (l *logRing) checkTail(blk, head int) (int, error) {
	for {
		bad, _, err := l.firstBad(blk, head)
		if err != nil || bad < 0 {
			return blk, err
		}
		if ahead := (bad - head + l.n) % l.n; ahead > inFlightSectors {
			return 0, corrupt("log", "the record at sector %d is damaged", bad)
		}
		next := (bad + 1) % l.n
		for ; next != head; next = (next + 1) % l.n {
			b, err := l.read(next, 1)
			if err != nil {
				return 0, err
			}
			if be32(b, 0) == recordMagic {
				break
			}
		}
		if next == head {
			return 0, corrupt("log", "no whole record between sectors %d and %d", blk, head)
		}
		blk = next
	}
}

// lastRecord finds the last record that begins before sector head, within limit
// sectors.
func (l *logRing) lastRecord(head, limit int) (record, bool, error) {
	const chunk = 64
	for back := 0; back < min(limit, l.n); {
		n := min(chunk, min(limit, l.n)-back)
		back += n
		blk := ((head-back)%l.n + l.n) % l.n
		b, err := l.read(blk, n)
		if err != nil {
			return record{}, false, err
		}
		for j := n - 1; j >= 0; j-- {
			if be32(b, j*sector) == recordMagic {
				rec, err := l.record((blk + j) % l.n)
				if errors.Is(err, diskfs.ErrCorrupt) {
					// Known by its place only: it ends nowhere.
					return record{blk: (blk + j) % l.n, bad: true}, true, nil
				}
				return rec, err == nil, err
			}
		}
	}
	return record{}, false, nil
}

// unmounted reports whether rec is whole and says that the volume was unmounted.
func (l *logRing) unmounted(rec record) (bool, error) {
	if rec.bad || rec.ops != 1 || rec.length < opHeaderSize {
		return false, nil
	}
	data, err := l.recordData(rec)
	if errors.Is(err, diskfs.ErrCorrupt) {
		return false, nil
	}
	return err == nil && data[9]&opUnmount != 0, err
}

func sectorName(blk int) string { return fmt.Sprintf("log sector %d", blk) }

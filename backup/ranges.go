package backup

import (
	"cmp"
	"slices"
	"sync"

	"github.com/varve-io/varve/backup/blocktree"
)

// mergeRanges sorts ranges and merges those that touch or overlap. It may reorder its
// argument.
func mergeRanges(ranges []blocktree.Range) []blocktree.Range {
	slices.SortFunc(ranges, func(a, b blocktree.Range) int { return cmp.Compare(a.Offset, b.Offset) })
	var out []blocktree.Range
	for _, r := range ranges {
		if r.Length <= 0 {
			continue
		}
		if n := len(out); n > 0 && r.Offset <= out[n-1].End() {
			out[n-1].Length = max(out[n-1].Length, r.End()-out[n-1].Offset)
			continue
		}
		out = append(out, r)
	}
	return out
}

// subtractRanges returns a without b. Both are sorted and do not overlap.
func subtractRanges(a, b []blocktree.Range) []blocktree.Range {
	var out []blocktree.Range
	for _, r := range a {
		off, end := r.Offset, r.End()
		for len(b) > 0 && b[0].End() <= off {
			b = b[1:]
		}
		for _, cut := range b {
			if cut.Offset >= end {
				break
			}
			if cut.Offset > off {
				out = append(out, blocktree.Range{Offset: off, Length: cut.Offset - off})
			}
			off = max(off, cut.End())
		}
		if off < end {
			out = append(out, blocktree.Range{Offset: off, Length: end - off})
		}
	}
	return out
}

// rangeList collects ranges from several workers, sorted and merged where they touch.
type rangeList struct {
	mu     sync.Mutex
	ranges []blocktree.Range
}

func (l *rangeList) add(off, length int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// Ranges that end before off stay before the new one; those that begin after its end
	// follow.
	first, _ := slices.BinarySearchFunc(l.ranges, off, func(r blocktree.Range, off int64) int {
		return cmp.Compare(r.End(), off)
	})
	end, last := off+length, first
	for ; last < len(l.ranges) && l.ranges[last].Offset <= end; last++ {
		off = min(off, l.ranges[last].Offset)
		end = max(end, l.ranges[last].End())
	}
	l.ranges = slices.Replace(l.ranges, first, last, blocktree.Range{Offset: off, Length: end - off})
}

// atMost returns the ranges, or, if there are more than n, fewer that cover them: rounded out
// to blocks, then to larger units until n are enough. They end at size.
func (l *rangeList) atMost(n int, block, size int64) []blocktree.Range {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.ranges
	for unit := block; len(out) > n; unit *= 2 {
		var wide rangeList
		for _, r := range out {
			from := r.Offset / unit * unit
			wide.add(from, min((r.End()+unit-1)/unit*unit, size)-from)
		}
		out = wide.ranges
	}
	return out
}

package backup

import (
	"slices"

	"github.com/varve-io/varve/backup/image"
)

// mergeRanges sorts ranges and joins those that touch or overlap. It may
// reorder its argument.
func mergeRanges(ranges []image.Range) []image.Range {
	slices.SortFunc(ranges, func(a, b image.Range) int {
		switch {
		case a.Offset < b.Offset:
			return -1
		case a.Offset > b.Offset:
			return 1
		}
		return 0
	})
	var out []image.Range
	for _, r := range ranges {
		if r.Length <= 0 {
			continue
		}
		if n := len(out); n > 0 && r.Offset <= out[n-1].Offset+out[n-1].Length {
			out[n-1].Length = max(out[n-1].Length, r.Offset+r.Length-out[n-1].Offset)
			continue
		}
		out = append(out, r)
	}
	return out
}

// subtractRanges returns a without b. Both are sorted and without overlaps.
func subtractRanges(a, b []image.Range) []image.Range {
	var out []image.Range
	for _, r := range a {
		off, end := r.Offset, r.Offset+r.Length
		for len(b) > 0 && b[0].Offset+b[0].Length <= off {
			b = b[1:]
		}
		for _, cut := range b {
			if cut.Offset >= end {
				break
			}
			if cut.Offset > off {
				out = append(out, image.Range{Offset: off, Length: cut.Offset - off})
			}
			off = max(off, cut.Offset+cut.Length)
		}
		if off < end {
			out = append(out, image.Range{Offset: off, Length: end - off})
		}
	}
	return out
}

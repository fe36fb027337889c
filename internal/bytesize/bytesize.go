// Package bytesize formats and parses sizes in the one form that Varve shows to people:
// powers of 1024 with at most one decimal, as in "1.5 GiB".
package bytesize

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Format writes n for people: "511 B", "64 MiB", "1.5 GiB". It rounds to one
// decimal.
func Format(n int64) string {
	if n < 0 {
		if n == math.MinInt64 {
			n++ // rounds to the same
		}
		return "-" + Format(-n)
	}
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n), -1
	for f >= 1023.95 || unit < 0 { // 1023.95 would round up to 1024.0
		f /= 1024
		unit++
	}
	return strings.TrimSuffix(strconv.FormatFloat(f, 'f', 1, 64), ".0") + " " + units[unit:unit+1] + "iB"
}

const units = "KMGTPE"

// Exact is Format, followed by the number of bytes where Format rounded:
// "64 MiB", "1.5 GiB (1610612741 bytes)". It is for messages that compare sizes
// and for sizes that scripts or other tools take.
func Exact(n int64) string {
	text := Format(n)
	if back, err := Parse(text); err == nil && back == n {
		return text
	}
	return fmt.Sprintf("%s (%d bytes)", text, n)
}

// Parse parses a size as people write it: 4096, 512K, 64MiB, "1.5 GiB"; always in powers of
// 1024.
func Parse(s string) (int64, error) {
	text := strings.ToUpper(strings.TrimSpace(s))
	digits := strings.TrimRight(text, units+"IB ")
	unit := strings.TrimSpace(text[len(digits):])
	unit = strings.TrimSuffix(strings.TrimSuffix(unit, "B"), "I")
	shift := strings.Index(" "+units, unit) // 0 for none, and for ""
	if len(unit) > 1 || shift < 0 {
		return 0, fmt.Errorf("%q is not a size like 512K, 64MiB or 2G", s)
	}
	scale := float64(int64(1) << (10 * shift))
	if n, err := strconv.ParseInt(digits, 10, 64); err == nil {
		if n < 0 || n > math.MaxInt64>>(10*shift) {
			return 0, fmt.Errorf("size %q is out of range", s)
		}
		return n << (10 * shift), nil
	}
	v, err := strconv.ParseFloat(digits, 64)
	if err != nil || math.IsNaN(v) {
		return 0, fmt.Errorf("%q is not a size like 512K, 64MiB or 2G", s)
	}
	if v < 0 || v*scale >= math.MaxInt64 {
		return 0, fmt.Errorf("size %q is out of range", s)
	}
	return int64(v * scale), nil
}

// Value is a command's flag that takes a size.
type Value int64

func (v *Value) String() string {
	if *v == 0 {
		return "0" // a default that the help does not show
	}
	return Exact(int64(*v))
}

// Type is what the help calls the flag's value.
func (v *Value) Type() string { return "size" }

// Set reads the flag's value.
func (v *Value) Set(s string) error {
	n, err := Parse(s)
	if err == nil {
		*v = Value(n)
	}
	return err
}

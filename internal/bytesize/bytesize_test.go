package bytesize_test

import (
	"math"
	"testing"

	"github.com/varve-io/varve/internal/bytesize"
)

func TestFormat(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1 MiB", 64 << 20: "64 MiB",
		3 << 29: "1.5 GiB", 1 << 62: "4 EiB", math.MaxInt64: "8 EiB", -2048: "-2 KiB", math.MinInt64: "-8 EiB",
	} {
		if got := bytesize.Format(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}

func TestExact(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1000: "1000 B", 64 << 20: "64 MiB", 3 << 29: "1.5 GiB", 64<<20 + 1: "64 MiB (67108865 bytes)", math.MaxInt64: "8 EiB (9223372036854775807 bytes)",
	} {
		if got := bytesize.Exact(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}

func TestParse(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "4096": 4096, "1K": 1024, "64MiB": 64 << 20, "64 mib": 64 << 20, "1.5G": 3 << 29, "1.5 GiB": 3 << 29, "2TB": 2 << 40, "7E": 7 << 60,
	} {
		if n, err := bytesize.Parse(s); err != nil || n != want {
			t.Errorf("size %q: %d, %v", s, n, err)
		}
	}
	for _, s := range []string{"", "-1", "x", "1X", "1KK", "8E", "NaN", "Inf", "9999999999999999999", "0x10", "K"} {
		if n, err := bytesize.Parse(s); err == nil {
			t.Errorf("size %q: %d", s, n)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"1", "1K", "1.5GiB", "8E", "-1", "1e30"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := bytesize.Parse(s); err == nil && n < 0 {
			t.Errorf("%q is %d", s, n)
		}
	})
}

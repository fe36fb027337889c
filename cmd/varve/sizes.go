package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// byteSize is a flag that takes a size: 4096, 512K, 64MiB, 1.5G; always in
// powers of 1024.
type byteSize int64

func (b *byteSize) String() string {
	n := int64(*b)
	for i, unit := range []string{"", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"} {
		if n == 0 || n%1024 != 0 || i == 6 {
			return strconv.FormatInt(n, 10) + unit
		}
		n /= 1024
	}
	return "" // not reached
}

func (b *byteSize) Type() string { return "size" }

func (b *byteSize) Set(s string) error {
	n, err := parseSize(s)
	if err == nil {
		*b = byteSize(n)
	}
	return err
}

func parseSize(s string) (int64, error) {
	text := strings.ToUpper(strings.TrimSpace(s))
	digits := strings.TrimRight(text, "KMGTPEIB ")
	unit := strings.TrimSpace(text[len(digits):])
	unit = strings.TrimSuffix(strings.TrimSuffix(unit, "B"), "I")
	shift := strings.Index(" KMGTPE", unit) // 0 for none, and for ""
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

// days is a flag that takes a duration with days and weeks too: 30d, 2w, 36h.
type days time.Duration

func (d *days) String() string {
	v := time.Duration(*d)
	if v != 0 && v%(24*time.Hour) == 0 {
		return fmt.Sprintf("%dd", v/(24*time.Hour))
	}
	return v.String()
}

func (d *days) Type() string { return "duration" }

func (d *days) Set(s string) error {
	v, err := parseDays(s)
	if err == nil {
		*d = days(v)
	}
	return err
}

func parseDays(s string) (time.Duration, error) {
	var unit time.Duration
	switch {
	case strings.HasSuffix(s, "d"):
		unit = 24 * time.Hour
	case strings.HasSuffix(s, "w"):
		unit = 7 * 24 * time.Hour
	default:
		v, err := time.ParseDuration(s)
		if err != nil || v < 0 {
			return 0, fmt.Errorf("%q is not a duration like 30d, 2w or 36h", s)
		}
		return v, nil
	}
	n, err := strconv.ParseInt(s[:len(s)-1], 10, 64)
	if err != nil || n < 0 || n > int64(math.MaxInt64/unit) {
		return 0, fmt.Errorf("%q is not a duration like 30d, 2w or 36h", s)
	}
	return time.Duration(n) * unit, nil
}

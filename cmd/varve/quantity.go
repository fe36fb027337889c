package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// parseBytes reads a size: bytes, or with K, M, G or T (also KiB and so on) in
// powers of 1024.
func parseBytes(s string) (int64, error) {
	text := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(strings.TrimSpace(s)), "B"), "I")
	shift := 0
	if i := strings.IndexByte("KMGTP", lastByte(text)); i >= 0 && text != "" {
		shift = 10 * (i + 1)
		text = strings.TrimSpace(text[:len(text)-1])
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is not a size: write bytes, or a number with K, M, G or T", s)
	}
	return n << shift, nil
}

func lastByte(s string) byte {
	if s == "" {
		return 0
	}
	return s[len(s)-1]
}

// parseShare reads a part of a whole: 0.1%, or 0.001.
func parseShare(s string) (float64, error) {
	text, percent := strings.CutSuffix(strings.TrimSpace(s), "%")
	x, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
	if percent {
		x /= 100
	}
	if err != nil || math.IsNaN(x) || x < 0 || x > 1 {
		return 0, fmt.Errorf("%q is not a share: write 0%% to 100%%", s)
	}
	return x, nil
}

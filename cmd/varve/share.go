package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// parseShare parses a share: 0.1%, or 0.001.
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

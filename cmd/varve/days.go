package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// days is the value of a flag: a duration that may have days and weeks, such as 30d, 2w, 36h.
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

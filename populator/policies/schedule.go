// Package policies turns BackupPolicies into VolumeBackups when they are due, and keeps a
// ProtectedVolume for each claim and store that a policy covers.
package policies

import (
	"fmt"
	"hash/fnv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
)

// schedule is a policy's schedule for one claim: the times of the cron, each delayed by
// the claim's share of the spread.
type schedule struct {
	cron   cron.Schedule
	offset time.Duration
}

// parseSchedule reads a Schedule. of sets the offset.
func parseSchedule(s v1alpha1.Schedule) (cron.Schedule, error) {
	zone := time.UTC
	if s.TimeZone != "" {
		var err error
		if zone, err = time.LoadLocation(s.TimeZone); err != nil {
			return nil, fmt.Errorf("timeZone %q: %w; use a name of the IANA database, such as Europe/Berlin", s.TimeZone, err)
		}
	}
	// The parser looks for the space behind the zone and panics if there is none.
	if zone, _, more := strings.Cut(s.Cron, " "); !more && strings.Contains(zone, "TZ=") {
		return nil, fmt.Errorf("cron %q: there are no fields after the time zone", s.Cron)
	}
	c, err := cron.ParseStandard(s.Cron)
	if err != nil {
		return nil, fmt.Errorf("cron %q: %w", s.Cron, err)
	}
	spec, ok := c.(*cron.SpecSchedule)
	if !ok {
		return nil, fmt.Errorf("cron %q: use five fields, or @hourly, @daily, @weekly or @monthly", s.Cron)
	}
	if s.TimeZone != "" || spec.Location == time.Local {
		spec.Location = zone
	}
	if spec.Next(time.Now()).IsZero() {
		return nil, fmt.Errorf("cron %q never comes", s.Cron)
	}
	return spec, nil
}

// of returns the schedule of one claim: all claims of a policy spread over its window,
// each always at the same place.
func of(c cron.Schedule, spread time.Duration, claim types.UID) schedule {
	s := schedule{cron: c}
	if spread > 0 {
		h := fnv.New64a()
		_, _ = h.Write([]byte(claim)) // never fails
		s.offset = time.Duration(h.Sum64() % uint64(spread)).Truncate(time.Second)
	}
	return s
}

// next time after t.
func (s schedule) next(t time.Time) time.Time { return s.cron.Next(t.Add(-s.offset)).Add(s.offset) }

// last returns the last time after from and not after now; zero if there is none. Missed
// times before it are skipped.
func (s schedule) last(from, now time.Time) time.Time {
	t := s.next(from)
	if t.After(now) {
		return time.Time{}
	}
	// Doubling steps get near now, even if from is long ago.
	for step := time.Minute; ; {
		jump := t.Add(step)
		if jump.After(now) {
			if step == time.Minute {
				break
			}
			step = time.Minute

			continue
		}
		if n := s.next(jump); !n.After(now) {
			t, step = n, step*2

			continue
		}
		if step == time.Minute {
			break
		}
		step = time.Minute
	}
	for n := s.next(t); !n.After(now); n = s.next(t) {
		t = n
	}
	return t
}

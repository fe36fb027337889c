package backup

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/varve-io/varve/backup/points"
)

// Policy says which points of a volume to keep. Each number keeps the newest point of each of
// that many hours, days and so on that have a point, counted back from the newest; several
// rules may keep one point.
type Policy struct {
	Latest  int
	Hourly  int
	Daily   int
	Weekly  int // ISO 8601 weeks, from Monday
	Monthly int
	Yearly  int
	// Within keeps every point that is at most this much older than the newest, or than now if
	// the newest is dated in the future: a volume that is no longer backed up keeps its last points.
	Within time.Duration
	// Location is the time zone in which days begin; nil for UTC.
	Location *time.Location
	// MergeLineages counts all points of a volume together. Without it each lineage is
	// counted separately, so that the last point of a disk that no longer exists is kept.
	MergeLineages bool
	// Floor is kept in addition to all of the above.
	Floor Floor

	now time.Time // zero: the newest point's time is trusted
}

// Floor is a minimum for every policy: the repository's owner sets it, and users who only
// choose a policy cannot lower it. A point is kept if either rule keeps it.
type Floor struct {
	// Points is how many of the newest points are kept.
	Points int
	// Age keeps points until they are this much older than the newest one, or than now if the
	// newest is dated in the future.
	Age time.Duration
}

func (f Floor) String() string {
	switch {
	case f.Age == 0:
		return fmt.Sprintf("the newest %d", f.Points)
	case f.Points == 0:
		return fmt.Sprintf("all younger than %v", f.Age)
	}
	return fmt.Sprintf("the newest %d and all younger than %v", f.Points, f.Age)
}

// newest returns the time from which ages count: a point of a clock that was ahead makes no other older.
func (p Policy) newest(t time.Time) time.Time {
	if !p.now.IsZero() && t.After(p.now) {
		return p.now
	}
	return t
}

// ErrEmptyPolicy means that a policy would keep nothing.
var ErrEmptyPolicy = errors.New("the policy keeps nothing: say what to keep, for example --keep-daily 7 --keep-weekly 4")

// Check rejects a policy that makes no sense.
func (p Policy) Check() error {
	sum := 0
	for _, n := range []int{p.Latest, p.Hourly, p.Daily, p.Weekly, p.Monthly, p.Yearly} {
		if n < 0 {
			return fmt.Errorf("cannot keep %d points", n)
		}
		sum |= n
	}
	if p.Within < 0 {
		return fmt.Errorf("cannot keep points of the last %v", p.Within)
	}
	if p.Floor.Points < 0 || p.Floor.Age < 0 {
		return fmt.Errorf("a negative floor: %d points, %v", p.Floor.Points, p.Floor.Age)
	}
	if sum == 0 && p.Within == 0 {
		return ErrEmptyPolicy
	}
	return nil
}

// Candidate is a point that a policy is applied to.
type Candidate struct {
	Point *points.Point
	// Hold lists why the point is kept under any policy: pins and readers.
	Hold []string
	// Damaged is why the point does not count as a copy. It is kept, since its intact parts
	// may have no other copy, but it does not replace another point.
	Damaged string
	// Part means that the point's group is incomplete: the point does not replace a point of
	// a complete group or of none, but otherwise the rules apply to it as to any.
	Part bool
}

// Decision says whether a point is kept, and why.
type Decision struct {
	Point   *points.Point
	Keep    bool
	Reasons []string // for keeping it; empty if it is deleted
	// ByFloor means that only the floor keeps it.
	ByFloor bool
}

// rule keeps the first point that it sees of each period.
type rule struct {
	name   string
	left   int
	period func(time.Time) string // nil: every point is a period of its own
	seen   map[string]bool
}

func (r *rule) keep(t time.Time) bool {
	if r.left == 0 {
		return false
	}
	if r.period != nil {
		key := r.period(t)
		if r.seen[key] {
			return false
		}
		r.seen[key] = true
	}
	r.left--
	return true
}

// Apply decides about the points of one volume, oldest first by generation; the result has
// the same order. It depends on nothing else: not on the clock, and not on the order of the
// points' times, which clock skew may have mixed up.
func (p Policy) Apply(pts []Candidate) []Decision {
	of := func(c Candidate) string {
		if p.MergeLineages {
			return ""
		}
		return c.Point.Lineage
	}
	places := map[string][]int{} // of each lineage's points
	for i, c := range pts {
		places[of(c)] = append(places[of(c)], i)
	}
	out := make([]Decision, len(pts))
	for _, at := range places {
		lineage := make([]Candidate, len(at))
		for i, j := range at {
			lineage[i] = pts[j]
		}
		decisions := p.applyOne(lineage)
		if whole := slices.DeleteFunc(slices.Clone(lineage), func(c Candidate) bool { return c.Part }); len(whole) < len(lineage) {
			of := map[*points.Point]Decision{}
			for _, d := range p.applyOne(whole) {
				of[d.Point] = d
			}
			for i, c := range lineage {
				if !c.Part {
					decisions[i] = of[c.Point]
				}
			}
		}
		for i, d := range decisions {
			out[at[i]] = d
		}
	}
	return out
}

// applyOne decides about the points of one lineage. The newest undamaged point is always
// kept: Check rejects a policy that keeps nothing.
func (p Policy) applyOne(pts []Candidate) []Decision {
	loc := p.Location
	if loc == nil {
		loc = time.UTC
	}
	layout := func(l string) func(time.Time) string {
		return func(t time.Time) string { return t.In(loc).Format(l) }
	}
	rules := []*rule{
		{name: "latest", left: p.Latest},
		// With the offset, since an hour occurs twice when summer time ends.
		{name: "hourly", left: p.Hourly, period: layout("2006-01-02T15 -0700")},
		{name: "daily", left: p.Daily, period: layout("2006-01-02")},
		{name: "weekly", left: p.Weekly, period: func(t time.Time) string {
			y, w := t.In(loc).ISOWeek()
			return fmt.Sprintf("%d-W%02d", y, w)
		}},
		{name: "monthly", left: p.Monthly, period: layout("2006-01")},
		{name: "yearly", left: p.Yearly, period: layout("2006")},
	}
	for _, r := range rules {
		r.seen = map[string]bool{}
	}
	floor := p.Floor.Points
	out := make([]Decision, len(pts))
	var newest *points.Point
	for i := len(pts) - 1; i >= 0; i-- {
		c := pts[i]
		d := Decision{Point: c.Point, Reasons: append([]string(nil), c.Hold...)}
		if c.Damaged != "" {
			d.Reasons = append(d.Reasons, "damaged: "+c.Damaged)
		} else {
			if newest == nil {
				newest = c.Point
			}
			for _, r := range rules {
				if r.keep(c.Point.Time) {
					d.Reasons = append(d.Reasons, r.name)
				}
			}
			since := func(age time.Duration) bool { return age > 0 && c.Point.Time.After(p.newest(newest.Time).Add(-age)) }
			if since(p.Within) {
				d.Reasons = append(d.Reasons, "within "+p.Within.String())
			}
			if floor > 0 || since(p.Floor.Age) {
				d.ByFloor = len(d.Reasons) == 0
				d.Reasons = append(d.Reasons, "floor")
			}
			floor--
		}
		d.Keep = len(d.Reasons) > 0
		out[i] = d
	}
	return out
}

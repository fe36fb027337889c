package backup

import (
	"errors"
	"fmt"
	"time"
)

// Policy says which points of a volume to keep. Each number keeps the newest
// point of each of that many hours, days and so on that have one, counted from
// the newest back; a point may be kept by several.
type Policy struct {
	Latest  int
	Hourly  int
	Daily   int
	Weekly  int // ISO 8601 weeks, from Monday
	Monthly int
	Yearly  int
	// Within keeps every point taken that long before the newest one: a volume
	// that is not backed up any more keeps its last ones.
	Within time.Duration
	// Location is where days begin; nil for UTC.
	Location *time.Location
	// MergeLineages counts all points of a volume together. Without it those of each
	// disk that the volume had are counted by themselves, so that the last point of a
	// disk that is gone stays.
	MergeLineages bool
	// Floor is kept whatever the numbers above say.
	Floor Floor
}

// Floor is what no policy goes below: the repository's owner sets it, and those who may
// only choose a policy cannot lower it. A point stays if either rule keeps it.
type Floor struct {
	// Points is how many of the newest stay.
	Points int
	// Age is how old a point is at least before it goes: older than the newest one by
	// that much, or than now if the newest is dated in the future.
	Age time.Duration

	now time.Time // zero: the newest point's time is taken for right
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

// keeps reports whether a point of that time is too young to go.
func (f Floor) keeps(t, newest time.Time) bool {
	if !f.now.IsZero() && newest.After(f.now) {
		newest = f.now
	}
	return f.Age > 0 && t.After(newest.Add(-f.Age))
}

// ErrEmptyPolicy means that a policy would keep nothing.
var ErrEmptyPolicy = errors.New("the policy keeps nothing: say what to keep, for example --keep-daily 7 --keep-weekly 4")

// Check reports whether the policy makes sense.
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
		return fmt.Errorf("a floor below nothing: %d points, %v", p.Floor.Points, p.Floor.Age)
	}
	if sum == 0 && p.Within == 0 {
		return ErrEmptyPolicy
	}
	return nil
}

// Candidate is a point that a policy is applied to.
type Candidate struct {
	Point *Point
	// Hold is why the point stays whatever the policy says: a pin, a reader.
	Hold []string
	// Damaged is why the point does not count as a copy; it stays, because it
	// may be the only one of what is intact in it, but it takes the place of no
	// other.
	Damaged string
}

// Decision is what becomes of a point, and why.
type Decision struct {
	Point   *Point
	Keep    bool
	Reasons []string // for keeping it; empty when it goes
	// ByFloor is set when nothing but the policy's floor keeps it.
	ByFloor bool
}

// rule keeps the first point it meets with a new name of its period.
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

// Apply decides about the points of one volume, given oldest first in the order
// of their generations, which is also the order of the result. It depends on
// nothing else: not on the clock, and not on the order of the points' times,
// which skewed clocks may have mixed up.
func (p Policy) Apply(points []Candidate) []Decision {
	of := func(c Candidate) string {
		if p.MergeLineages {
			return ""
		}
		return c.Point.Lineage
	}
	places := map[string][]int{} // of each lineage's points
	for i, c := range points {
		places[of(c)] = append(places[of(c)], i)
	}
	out := make([]Decision, len(points))
	for _, at := range places {
		lineage := make([]Candidate, len(at))
		for i, j := range at {
			lineage[i] = points[j]
		}
		for i, d := range p.applyOne(lineage) {
			out[at[i]] = d
		}
	}
	return out
}

// applyOne decides about the points of one lineage. The newest whole one always stays: a
// policy that keeps nothing is refused by Check.
func (p Policy) applyOne(points []Candidate) []Decision {
	loc := p.Location
	if loc == nil {
		loc = time.UTC
	}
	layout := func(l string) func(time.Time) string {
		return func(t time.Time) string { return t.In(loc).Format(l) }
	}
	rules := []*rule{
		{name: "latest", left: p.Latest},
		// With the offset, because an hour comes twice when summer time ends.
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
	out := make([]Decision, len(points))
	var newest *Point
	for i := len(points) - 1; i >= 0; i-- {
		c := points[i]
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
			if p.Within > 0 && c.Point.Time.After(newest.Time.Add(-p.Within)) {
				d.Reasons = append(d.Reasons, "within "+p.Within.String())
			}
			if floor > 0 || p.Floor.keeps(c.Point.Time, newest.Time) {
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

package blocktree

import (
	"time"

	"github.com/varve-io/varve/internal/plain"
)

// Levels of consistency.
const (
	// ApplicationConsistent: at the moment of the point the application had written all that
	// it had acknowledged, in a form that it opens without recovery.
	ApplicationConsistent = "application-consistent"
	// CrashConsistent: the bytes are of one moment, as after a power failure.
	CrashConsistent = "crash-consistent"
	// NotConsistent: the bytes are of several moments.
	NotConsistent = "none"
)

// Consistency is how the moment of a point was made, as recorded by the code that made it.
type Consistency struct {
	// Level is one of the three above. An unknown level of a newer Varve counts as none of
	// them.
	Level string `json:"level"`
	// Method is how the moment was made, as a token: snapshot, group-snapshot, hold, dump, ...
	Method string `json:"method,omitempty"`
	// Time is when it was made; zero if unknown.
	Time time.Time `json:"time,omitzero"`
	// OneMoment means that the moment is that of all points of the group, not only of this
	// one.
	OneMoment bool `json:"oneMoment,omitempty"`
	// Holds are what was frozen for it, in the order of their starts.
	Holds []Hold `json:"holds,omitempty"`
	// Detail is a text for people, such as why the level is lower than requested.
	Detail string `json:"detail,omitempty"`
}

// Hold is one application or file system that was frozen.
type Hold struct {
	// Name is the name of the hook or recipe, such as postgresql.
	Name string `json:"name"`
	// Target is what was frozen, such as a pod and a container.
	Target string `json:"target,omitempty"`
	// Start is when it was frozen, Duration for how long.
	Start    time.Time     `json:"start,omitzero"`
	Duration time.Duration `json:"durationNs,omitempty"`
	// Proven means that the hold was proven to last beyond the moment.
	Proven bool   `json:"proven,omitempty"`
	Detail string `json:"detail,omitempty"`
	// Notes are texts of the application that a restore may need, by name, such as the backup_label
	// of PostgreSQL. They are kept byte by byte.
	Notes map[string]string `json:"notes,omitempty"`
}

// maxNotes bounds the notes of a record, in bytes.
const maxNotes = 256 << 10

// MaxHolds bounds the holds of a record.
const MaxHolds = 256

// check applies the rules of Record.Check.
func (c *Consistency) check(r *Record) error {
	if !ValidTime(c.Time) || len(c.Holds) > MaxHolds {
		return r.wrong("the consistency is of the year %d, with %d holds", c.Time.Year(), len(c.Holds))
	}
	notes := 0
	for _, h := range c.Holds {
		for k, v := range h.Notes {
			notes += len(k) + len(v)
		}
		if notes > maxNotes {
			return r.wrong("the holds have notes of more than %d bytes", maxNotes)
		}
		if !ValidTime(h.Start) || h.Duration < 0 {
			return r.wrong("a hold of %d ns in the year %d", h.Duration, h.Start.Year())
		}
	}
	if r.NotCrashConsistent {
		c.Level = NotConsistent // a disk written to while it was read is no better
	}
	return nil
}

// clean makes its texts safe to show.
func (c *Consistency) clean() {
	for _, s := range []*string{&c.Level, &c.Method} {
		if *s != "" && !plain.Token(*s) {
			*s = unknownToken
		}
	}
	c.Detail = plain.Clip(c.Detail, maxText)
	for i := range c.Holds {
		h := &c.Holds[i]
		h.Name, h.Target, h.Detail = plain.Clip(h.Name, maxLabel), plain.Clip(h.Target, maxLabel), plain.Clip(h.Detail, maxText)
	}
}

// LevelRank orders levels: 2 for application-consistent, 1 for crash-consistent, 0 for all else.
func LevelRank(level string) int {
	switch level {
	case ApplicationConsistent:
		return 2
	case CrashConsistent:
		return 1
	}
	return 0
}

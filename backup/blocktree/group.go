package blocktree

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/varve-io/varve/internal/plain"
)

// MaxGroupMembers bounds the members of a group: each of its points names them all, in its
// record and in the tags of its manifest, which every list holds in memory.
const MaxGroupMembers = 128

// Group marks recovery points that were made together: the disks of one virtual machine, the
// claims of one application. Every point of the group has the same Group in its record, so
// that each shows whether the group is complete.
type Group struct {
	// ID is the ID of the group, in the form of a point's.
	ID string `json:"id"`
	// Name has the form namespace/name and is the same for each run: the machine's, the
	// application's.
	Name string `json:"name"`
	// Time is the moment that the group was made for. Each point has its own as well.
	Time time.Time `json:"time"`
	// Members are the wanted volumes, namespace/name each, sorted, of the cluster of the
	// points.
	Members []string `json:"members"`
	// Description is for people.
	Description string `json:"description,omitempty"`
}

// Check rejects a group that no Varve writes, and makes its texts safe to show.
func (g *Group) Check() error {
	switch {
	case !ValidID(g.ID):
		return fmt.Errorf("%q is not the ID of a group", plain.Clip(g.ID, maxLabel))
	case !validVolume(g.Name):
		return fmt.Errorf("%q is not the name of a group: want namespace/name", plain.Clip(g.Name, maxLabel))
	case !ValidTime(g.Time):
		return fmt.Errorf("the time of group %s is outside of the years 0 to 9999", g.Name)
	case len(g.Members) == 0 || len(g.Members) > MaxGroupMembers:
		return fmt.Errorf("group %s has %d members: want 1 to %d", g.Name, len(g.Members), MaxGroupMembers)
	}
	for i, m := range g.Members {
		if !validVolume(m) {
			return fmt.Errorf("group %s: %q is not the name of a volume: want namespace/name", g.Name, plain.Clip(m, maxLabel))
		}
		if i > 0 && g.Members[i-1] >= m {
			return fmt.Errorf("group %s: its members are not in order, or one is there twice: %s", g.Name, m)
		}
	}
	g.Description = plain.Clip(g.Description, maxLabel)
	return nil
}

// Has reports whether a volume, namespace/name, is one of the members.
func (g *Group) Has(volume string) bool {
	_, ok := slices.BinarySearch(g.Members, volume)
	return ok
}

// maxNamePart is the longest namespace or name of a volume, as in DNS.
const maxNamePart = 253

// ValidNamePart reports whether s may be the namespace, name or cluster of a volume: 1 to 253
// letters, digits, '.', '_' and '-', not starting with '.' or '-'. They name directories,
// exports and metrics.
func ValidNamePart(s string) bool {
	return s != "" && len(s) <= maxNamePart && s[0] != '.' && s[0] != '-' &&
		!strings.ContainsFunc(s, func(r rune) bool { return !nameRune(r) })
}

func nameRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-'
}

// validVolume reports whether s is namespace/name.
func validVolume(s string) bool {
	namespace, name, ok := strings.Cut(s, "/")
	return ok && ValidNamePart(namespace) && ValidNamePart(name)
}

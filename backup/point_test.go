package backup

import (
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
)

// TestHostileTags: whoever can write to the repository writes the tags. What is no ID there,
// such as a path, is not taken for one.
func TestHostileTags(t *testing.T) {
	good := recordTags(&blocktree.Record{
		ID: strings.Repeat("a1", 16), Parent: strings.Repeat("b2", 16), Lineage: strings.Repeat("c3", 16),
		Generation: 2, Kind: blocktree.KindIncremental, Time: time.Now(), Size: 1 << 20, BlockSize: 64 << 10,
	})
	if err := new(Point).fillFromTags(good); err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{tagID, tagParent, tagLineage} {
		for _, value := range []string{
			"../../../../../../../victim/data", strings.Repeat("A1", 16), strings.Repeat("a", 31), strings.Repeat("a", 33),
			strings.Repeat("a", 31) + "\n", strings.Repeat("a", 30) + "/.", "$(touch /tmp/aaaaaaaaaaaaaaaaaa)",
		} {
			tags := maps.Clone(good)
			tags[tag] = value
			if err := new(Point).fillFromTags(tags); !errors.Is(err, errNoTags) {
				t.Errorf("%s=%q: %v", tag, value, err)
			}
		}
	}
	tags := maps.Clone(good)
	tags[tagKind] = "full\x1b[2J"
	if err := new(Point).fillFromTags(tags); !errors.Is(err, errNoTags) {
		t.Errorf("a kind that is none: %v", err)
	}
}

package points

import (
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/internal/plain"
)

// TestHostileTags: any writer to the repository can write tags. An invalid ID, such as a
// path, is rejected.
func TestHostileTags(t *testing.T) {
	good := Tags(&blocktree.Record{
		ID: strings.Repeat("a1", 16), Parent: strings.Repeat("b2", 16), Lineage: strings.Repeat("c3", 16),
		Generation: 2, Kind: blocktree.KindIncremental, Time: time.Now(), Size: 1 << 20, BlockSize: 64 << 10,
	})
	if err := new(Point).fillFromTags(good); err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{TagID, tagParent, tagLineage} {
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
	for tag, values := range map[string][]string{
		tagKind:       {"", "full\x1b[2J"},
		TagGeneration: {"", "0", "-1", "9223372036854775807", "1e3", "99999999999999999999"},
		tagSize:       {"", "-1", "9223372036854775807"},
		tagBlockSize:  {"", "0", "-65536", "65537", "9223372036854775807"},
		tagTime:       {"", "yesterday", "9999-12-31T23:59:59-12:00"},
		tagUnread:     {"-1", "x", "1048577", "9223372036854775807"},
	} {
		for _, value := range values {
			tags := maps.Clone(good)
			tags[tag] = value
			if err := new(Point).fillFromTags(tags); !errors.Is(err, errNoTags) {
				t.Errorf("%s=%q: %v", tag, value, err)
			}
		}
	}
	tags := maps.Clone(good)
	for _, tag := range []string{tagChangeID, tagHandle, tagSnapshot, tagRun, tagNamespace} {
		tags[tag] = "\x1b]0;x\x07\u202e\n" + strings.Repeat("x", 1<<20)
	}
	var p Point
	if err := p.fillFromTags(tags); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{p.ChangeID, p.VolumeHandle, p.SnapshotHandle, p.Run, p.NamespaceUID} {
		if !plain.Is(text) || len(text) > MaxNote {
			t.Errorf("%.60q of %d bytes is left as it was", text, len(text))
		}
	}
}

func FuzzTags(f *testing.F) {
	f.Add("a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1", "", "full", "1", "1048576", "65536", "2026-11-20T10:00:00Z", "handle", "5")
	f.Fuzz(func(t *testing.T, id, parent, kind, generation, size, block, at, handle, unread string) {
		var p Point
		if p.fillFromTags(map[string]string{
			tagFormat: "1", TagID: id, tagParent: parent, tagKind: kind, TagGeneration: generation, tagSize: size, tagBlockSize: block,
			tagTime: at, tagHandle: handle, tagChangeID: handle, tagUnread: unread,
		}) != nil {
			return
		}
		if !blocktree.ValidID(p.ID) || !plain.Is(p.Name()) || !plain.Is(p.VolumeHandle) || p.Size < 0 || p.Unread < 0 || p.Unread > p.Size || p.Generation+1 <= 0 {
			t.Fatalf("%+v", p)
		}
		if _, err := json.Marshal(&p); err != nil {
			t.Fatal(err)
		}
	})
}

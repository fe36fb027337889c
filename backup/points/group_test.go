package points

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/internal/plain"
)

// grouped adds points of a group to a catalogue: "a:3" is of volume shop/vm-a and generation 3.
func (c *Catalog) grouped(id string, at time.Time, wanted string, pts ...string) {
	g := &blocktree.Group{ID: strings.Repeat(id, 32), Name: "shop/vm", Time: at, Members: strings.Fields(wanted)}
	for _, text := range pts {
		name, number, _ := strings.Cut(text, ":")
		generation, err := strconv.ParseInt(number, 10, 64)
		if err != nil {
			panic(err)
		}
		c.points = append(c.points, &Point{
			ID: NewID(), Volume: Volume{Namespace: "shop", Name: "vm-" + name, Cluster: "test"}, Generation: generation, Time: at, Group: g,
		})
	}
	c.sort()
}

// TestGroupsAreOrderedByGeneration: the latest group is the last one made, whatever the
// clocks said.
func TestGroupsAreOrderedByGeneration(t *testing.T) {
	const ab = "shop/vm-a shop/vm-b"
	at := func(n int) time.Time { return time.Date(2026, 11, 20, 10, n, 0, 0, time.UTC) }
	for _, tc := range []struct {
		name string
		make func(*Catalog)
		want string
	}{
		{"by time", func(c *Catalog) {
			c.grouped("1", at(1), ab, "a:1", "b:1")
			c.grouped("2", at(2), ab, "a:2", "b:2")
		}, "12"},
		{"a clock that went back", func(c *Catalog) {
			c.grouped("1", at(5), ab, "a:1", "b:1")
			c.grouped("2", at(2), ab, "a:2", "b:2")
		}, "12"},
		{"one time", func(c *Catalog) {
			c.grouped("2", at(1), ab, "a:1", "b:1")
			c.grouped("1", at(1), ab, "a:2", "b:2")
		}, "21"},
		{"an incomplete one, and generations that differ", func(c *Catalog) {
			c.grouped("1", at(5), ab, "a:90", "b:1")
			c.grouped("2", at(2), ab, "b:2")
			c.grouped("3", at(1), ab, "a:91", "b:3")
		}, "123"},
		{"without a common volume", func(c *Catalog) {
			c.grouped("1", at(2), ab, "a:1")
			c.grouped("2", at(1), ab, "b:9")
		}, "21"},
		{"runs that met", func(c *Catalog) {
			c.grouped("1", at(1), ab, "a:1", "b:2")
			c.grouped("2", at(2), ab, "a:2", "b:1")
		}, "12"},
	} {
		c := &Catalog{}
		tc.make(c)
		got := ""
		for _, g := range c.Groups().All() {
			got += g.ID[:1]
		}
		if got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
		latest, err := Names{Catalog: c, Cluster: "test"}.ReadGroup("shop/vm@latest")
		if err != nil || latest.ID[:1] != tc.want[len(tc.want)-1:] {
			t.Errorf("%s: the latest is %v, %v", tc.name, latest, err)
		}
	}
}

// TestGroupMembers: contradictory members do not make a group complete, and a point under
// another name belongs to none.
func TestGroupMembers(t *testing.T) {
	c := &Catalog{}
	now := time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC)
	c.grouped("1", now, "shop/vm-a shop/vm-b", "a:1")
	c.grouped("1", now, "shop/vm-c", "c:1") // of the same ID, naming itself only
	g := c.Groups().All()
	if len(g) != 1 || g[0].Complete() || len(g[0].Wanted) != 3 || len(g[0].Missing) != 1 || g[0].Missing[0].Name != "vm-b" {
		t.Errorf("groups %+v", g)
	}
	p := &Point{Volume: Volume{Namespace: "shop", Name: "copy", Cluster: "test"}}
	p.fillFromRecord(&blocktree.Record{Group: c.points[0].Group})
	if p.Group != nil {
		t.Errorf("a copy is of group %+v", p.Group)
	}
	for _, tc := range []struct {
		levels []string
		one    bool
		want   string
	}{
		{[]string{"application-consistent", "crash-consistent"}, true, "crash-consistent"},
		{[]string{"application-consistent", "application-consistent"}, true, "application-consistent"},
		{[]string{"application-consistent", "application-consistent"}, false, "none"},
		{[]string{"application-consistent", ""}, true, ""},
		{[]string{"application-consistent", "unknown"}, true, "none"},
		{[]string{"none", ""}, true, "none"},
	} {
		c := &Catalog{}
		c.grouped("1", now, "shop/vm-a shop/vm-b", "a:1", "b:1")
		for i, level := range tc.levels {
			c.points[i].Consistency, c.points[i].OneMoment = level, tc.one
		}
		if got := c.Groups().All()[0].Consistency(); got != tc.want {
			t.Errorf("%v, one moment %v: %q, want %q", tc.levels, tc.one, got, tc.want)
		}
	}
}

// FuzzGroupTags: with any tags, a point belongs to a group that names it, or to none.
func FuzzGroupTags(f *testing.F) {
	f.Add(strings.Repeat("a1", 16), "shop/vm", "2026-11-20T10:00:00Z", "shop/vm-a shop/vm-b", "crash-consistent", "")
	f.Add(strings.Repeat("a1", 16), "shop/vm", "2026-11-20T10:00:00Z", "shop/vm-b  shop/vm-a", "none", "stream")
	f.Add("../x", "\x1b[2J", "9999-12-31T23:59:59-12:00", "shop/vm-a", "x y", "tape")
	f.Fuzz(func(t *testing.T, id, name, at, members, level, content string) {
		p := &Point{Volume: Volume{Namespace: "shop", Name: "vm-a", Cluster: "test"}}
		if p.fillFromTags(map[string]string{
			tagFormat: "1", TagID: strings.Repeat("b2", 16), tagKind: "full", TagGeneration: "1", tagSize: "5", tagBlockSize: map[bool]string{true: "0", false: "65536"}[content == "stream"],
			tagTime: "2026-11-20T10:00:00Z", TagGroup: id, TagGroupName: name, tagGroupTime: at, tagGroupMembers: members, tagConsistency: level, tagOneMoment: "true", tagContent: content,
		}) != nil {
			return
		}
		if !plain.Is(p.Consistency) || p.Stream != (content == "stream") {
			t.Fatalf("%+v", p)
		}
		if p.Group == nil {
			return
		}
		if !blocktree.ValidID(p.Group.ID) || !p.Group.Has("shop/vm-a") || !plain.Is(p.Group.Name) || len(p.Group.Members) > blocktree.MaxGroupMembers {
			t.Fatalf("%+v", p.Group)
		}
		c := &Catalog{points: []*Point{p}}
		g := c.Groups().Of(p)
		if g == nil || g.Member(p.Volume) != p || !plain.Is(g.String()) || len(g.Wanted) != len(p.Group.Members) || len(g.Missing) != len(g.Wanted)-1 {
			t.Fatalf("%+v", g)
		}
		if _, err := json.Marshal(p); err != nil {
			t.Fatal(err)
		}
	})
}

package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/points"
)

// TestOneEach: members of other namespaces, and streams, may have names that meet in a directory.
func TestOneEach(t *testing.T) {
	t.Parallel()
	volume := func(namespace, name string) points.Volume {
		return points.Volume{Namespace: namespace, Name: name, Cluster: "c"}
	}
	for name, of := range map[string][]*points.Point{
		"namespaces": {{Volume: volume("a", "b")}, {Volume: volume("shop", "a-b")}},
		"streams":    {{Volume: volume("shop", "db")}, {Volume: volume("shop", "db.img"), Stream: true}},
	} {
		g := &points.Group{Name: volume("shop", "vm"), Points: of, Wanted: []points.Volume{of[0].Volume, of[1].Volume}}
		paths, err := groupTargets(g, []string{filepath.Join(t.TempDir(), "out")})
		if err != nil {
			t.Fatal(err)
		}
		if err := oneEach(g.Members(), paths); err == nil || !strings.Contains(err.Error(), "MEMBER=TARGET") {
			t.Errorf("%s: %v: %v", name, paths, err)
		}
		if err := oneEach(g.Members(), []string{"x", "y"}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

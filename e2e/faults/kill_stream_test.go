package faults

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// TestKillStream kills backups of a stream: only a complete one has a point, and the next run makes
// it.
func TestKillStream(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", 24<<20)
	args := []string{"backup", "--exec", "--volume", "shop/db-dump", "--checkpoint-every", "1ns", "-o", "json", "--", "sh", "-c", `cat "$0"`, s.disk}
	r, work := s.watch(-1, 0, args...)
	if r.code != 0 {
		t.Fatal(r.stderr)
	}
	s.made(r.stdout)
	hit := 0
	for runs := 0; runs < kills || hit == 0; runs++ {
		s.scribble(0, 18<<20)
		if s.killed(sooner(work*9/10, runs), args...) {
			hit++
		}
		s.check()
	}
	t.Logf("%d were killed before they were done", hit)
	s.scribble(0, 1<<20)
	s.made(s.varve(args...))
	s.check()
	s.varve("verify", "--read", "100%")
	s.varve("maintenance", "run", "--full", "--safety=none")
	s.check()
	s.varve("verify", "--read", "100%")
}

// TestKillGroup kills backups of two disks: each existing point is whole, and a group is complete only
// with both.
func TestKillGroup(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", 6<<20)
	other := filepath.Join(s.dir, "other.img")
	disks := map[string][]byte{} // by the first bytes of a disk
	change := func() {
		t.Helper()
		s.scribble(0, 4<<20)
		second := bytes.Clone(s.data)
		second[0] ^= 0xff
		if err := os.WriteFile(other, second, 0o600); err != nil {
			t.Fatal(err)
		}
		disks[string(s.data[:64])], disks[string(second[:64])] = s.data, second
	}
	// groups returns how many groups are complete.
	groups := func() (complete int) {
		t.Helper()
		var list []struct {
			ID      string
			Points  []json.RawMessage
			Missing []string
		}
		if err := json.Unmarshal([]byte(s.varve("list", "--groups", "-o", "json")), &list); err != nil {
			t.Fatal(err)
		}
		for _, g := range list {
			if len(g.Missing) == 0 {
				complete++
			}
			if len(g.Missing) == 0 != (len(g.Points) == 2) {
				t.Errorf("group %s has %d points and misses %v", g.ID, len(g.Points), g.Missing)
			}
		}
		return complete
	}
	args := []string{"backup", "a=" + s.disk, "b=" + other, "--volume", "shop/vm", "--workers", "1", "-o", "json"}
	change()
	r, work := s.watch(-1, 0, args...)
	if r.code != 0 {
		t.Fatal(r.stderr)
	}
	if n := groups(); n != 1 {
		t.Fatalf("%d groups are complete", n)
	}
	hit := 0
	for runs := 0; runs < kills || hit == 0; runs++ {
		change()
		if s.killed(sooner(work*9/10, runs), args...) {
			hit++
		}
		groups()
	}
	t.Logf("%d were killed before they were done", hit)
	before := groups()
	change()
	s.varve(args...)
	if n := groups(); n != before+1 {
		t.Errorf("%d groups are complete, want %d", n, before+1)
	}
	for _, id := range s.ids() {
		got, err := s.command("restore", id, "-").Output()
		if err != nil || len(got) < 64 || !bytes.Equal(got, disks[string(got[:64])]) {
			t.Errorf("point %s: restored %d bytes, which are of no disk that was backed up: %v", id, len(got), err)
		}
	}
	s.varve("verify", "--read", "100%")
}

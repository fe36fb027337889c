package main

import (
	"os"
	"strings"
	"testing"
)

// A shrunk, an emptied and another disk are refused, and an accepted one does not replace the
// points of the disk before.
func TestBackupOfAnotherDisk(t *testing.T) {
	env, disk := newBackupEnv(t)
	whole := contents(t, disk)
	put := func(data []byte) {
		t.Helper()
		if err := os.WriteFile(disk, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(what string, says ...string) {
		t.Helper()
		r := runVarve(t, env, "backup", disk, "--volume", "shop/db")
		if r.code != exitRefused {
			t.Errorf("%s: exit code %d: %s", what, r.code, r.stderr)
		}
		for _, text := range says {
			if !strings.Contains(r.stderr, text) {
				t.Errorf("%s: the error does not say %q: %s", what, text, r.stderr)
			}
		}
		if n := countPoints(t, env); n != 1 {
			t.Fatalf("%s: %d points", what, n)
		}
	}
	first := backupJSON(t, env, disk, "--volume", "shop/db")
	put(nil)
	refused("empty", "--allow-shrink", "--new-disk")
	put(whole[:len(whole)/2])
	refused("shrunk", "--allow-shrink", "--new-disk")
	put(make([]byte, len(whole)))
	refused("wiped", "--new-disk", first.Name)
	if r := runVarve(t, env, "backup", disk, "--volume", "shop/db", "--new-disk", "--extents", disk); r.code != exitUsage {
		t.Errorf("--new-disk with --extents: exit code %d: %s", r.code, r.stderr)
	}
	second := backupJSON(t, env, disk, "--volume", "shop/db", "--new-disk")
	if second.Lineage != second.ID {
		t.Errorf("the new disk's point: %+v", second)
	}
	if out := mustRun(t, env, "list").stdout; !strings.Contains(out, "new disk") {
		t.Errorf("listed:\n%s", out)
	}
	if out := mustRun(t, env, "show", "shop/db@latest").stdout; !strings.Contains(out, "begins here") || !strings.Contains(out, "it is blank") {
		t.Errorf("shown:\n%s", out)
	}
	// By year, so that no midnight parts the points.
	out := mustRun(t, env, "prune", "--keep-yearly", "7").stdout
	if countPoints(t, env) != 2 || !strings.Contains(out, "first disk") {
		t.Errorf("pruned:\n%s", out)
	}
	mustRun(t, env, "prune", "--keep-yearly", "7", "--merge-lineages")
	if n := countPoints(t, env); n != 1 {
		t.Errorf("all counted together: %d points are left", n)
	}
	put(whole[:len(whole)/2])
	if r := backupJSON(t, env, disk, "--volume", "shop/db", "--allow-shrink"); r.Lineage != second.ID {
		t.Errorf("a smaller disk is another: %+v", r)
	}
}

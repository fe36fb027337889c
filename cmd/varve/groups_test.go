package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/points"
)

// newGroupEnv makes a repository, and two disks as files of a directory.
func newGroupEnv(t *testing.T) (env testEnv, dir string, disks map[string][]byte) {
	t.Helper()
	env, dir = newTestEnv(t), t.TempDir()
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(dir, "repo"))
	disks = map[string][]byte{"root": bytes.Repeat([]byte("root"), 50_000), "data": bytes.Repeat([]byte("data"), 80_001)}
	for name, data := range disks {
		if err := os.WriteFile(filepath.Join(dir, name+".img"), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return env, dir, disks
}

func jsonOf[T any](t *testing.T, env testEnv, args ...string) T {
	t.Helper()
	return fromJSON[T](t, mustRun(t, env, append(args, "-o", "json")...).stdout)
}

// loseManifest deletes a point as an older Varve does, which does not know groups.
func loseManifest(t *testing.T, env testEnv, id string) {
	t.Helper()
	ctx := t.Context()
	r := openRepo(t, env)
	defer r.Close(ctx)
	cat, err := points.List(ctx, r, points.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := r.NewWriter(ctx, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := errors.Join(w.DeleteSnapshot(ctx, cat.ByID(id).ManifestID), w.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
}

// refused runs varve and expects an exit code and parts of the message.
func refused(t *testing.T, env testEnv, code int, part string, args ...string) {
	t.Helper()
	if r := runVarve(t, env, args...); r.code != code || !strings.Contains(r.stderr, part) {
		t.Errorf("varve %s: exit code %d, want %d and %q: %s", strings.Join(args, " "), r.code, code, part, r.stderr)
	}
}

// TestGroups takes a group through the commands.
func TestGroups(t *testing.T) {
	t.Parallel()
	env, dir, disks := newGroupEnv(t)
	root, data := filepath.Join(dir, "root.img"), filepath.Join(dir, "data.img")
	made := jsonOf[groupResult](t, env, "backup", root, "db="+data, "--volume", "shop/vm")
	if len(made.Points) != 2 || len(made.Group.Members) != 2 || made.Group.Members[0] != "shop/vm-db" || made.Group.Members[1] != "shop/vm-root" {
		t.Fatalf("made %+v", made)
	}
	list := jsonOf[[]groupView](t, env, "list", "--groups")
	if len(list) != 1 || !list[0].Complete || list[0].ID != made.Group.ID || list[0].Consistency != "" || len(list[0].Points) != 2 {
		t.Fatalf("listed %+v", list)
	}
	for _, args := range [][]string{{"list"}, {"list", "shop/vm-db"}, {"list", "--groups"}, {"list", "--groups", "shop/vm-db"}, {"show", "--group", "shop/vm@latest"}, {"show", "shop/vm-db@latest"}} {
		if out := mustRun(t, env, args...).stdout; !strings.Contains(out, "shop/vm") || strings.Contains(out, "incomplete") {
			t.Errorf("varve %s:\n%s", strings.Join(args, " "), out)
		}
	}

	// Restored as one: into a directory, and to targets; refused before anything is written.
	out := filepath.Join(dir, "out")
	mustRun(t, env, "restore", "--group", "shop/vm@latest", out, "--verify")
	refused(t, env, exitUsage, "no target for shop/vm-db", "restore", "--group", "shop/vm@latest", "root="+filepath.Join(dir, "r"))
	refused(t, env, exitUsage, "two targets", "restore", "--group", "shop/vm@latest", "root="+filepath.Join(dir, "r"), "vm-root="+filepath.Join(dir, "s"))
	refused(t, env, exitUsage, "the same target", "restore", "--group", "shop/vm@latest", "root="+filepath.Join(dir, "r"), "db="+filepath.Join(dir, ".", "r"))
	refused(t, env, exitUsage, "standard output", "restore", "--group", "shop/vm@latest", "-")
	refused(t, env, exitRefused, "nothing was written by this run", "restore", "--group", "shop/vm@latest", "db="+filepath.Join(dir, "d"), "root="+root)
	if _, err := os.Stat(filepath.Join(dir, "d")); !os.IsNotExist(err) {
		t.Errorf("a refused restore left a target: %v", err)
	}
	mustRun(t, env, "restore", "--group", made.Group.ID[:8], "db="+filepath.Join(dir, "d"), "shop/vm-root="+filepath.Join(dir, "r"))
	for path, want := range map[string][]byte{
		filepath.Join(out, "vm-db.img"): disks["data"], filepath.Join(out, "vm-root.img"): disks["root"],
		filepath.Join(dir, "d"): disks["data"], filepath.Join(dir, "r"): disks["root"],
	} {
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", path, len(got), err)
		}
	}

	// Pinned and deleted as one.
	mustRun(t, env, "pin", "shop/vm-db@latest", "audit")
	refused(t, env, exitRefused, "pinned", "forget", "--group", "shop/vm@latest")
	mustRun(t, env, "unpin", "--group", "shop/vm@latest", "--all")
	refused(t, env, exitRefused, "--group", "forget", "shop/vm-db@latest")
	mustRun(t, env, "verify", "--group", "shop/vm@latest", "--read", "100%")
	mustRun(t, env, "backup", root, "db="+data, "--volume", "shop/vm")
	if out := mustRun(t, env, "prune", "--volume", "shop/vm-db", "--keep-latest", "1").stdout; !strings.Contains(out, "group: shop/vm-root is not pruned here") || countPoints(t, env) != 4 {
		t.Errorf("prune of one volume:\n%s", out)
	}
	if out := mustRun(t, env, "prune", "--volume", "shop/vm", "--keep-latest", "1").stdout; countPoints(t, env) != 2 {
		t.Errorf("prune of the group's volumes:\n%s", out)
	}
	mustRun(t, env, "forget", "--group", "shop/vm@latest")
	if out := mustRun(t, env, "list", "--groups").stdout; !strings.Contains(out, "No groups") {
		t.Errorf("after forget: %s", out)
	}
	for _, args := range [][]string{
		{"backup", root, root, "--volume", "shop/vm"}, {"backup", "a b=" + root, data, "--volume", "shop/vm"},
		{"backup", root, data, "--volume", "shop/vm", "--parent", "x"}, {"verify", "--group"}, {"list", "--groups", "--all"}, {"list", "--groups", "--foreign"},
		{"restore", "shop/x@latest", "a", "b"}, {"restore", "shop/x@latest", "a", "--incomplete"},
	} {
		refused(t, env, exitUsage, "", args...)
	}
}

// TestIncompleteGroup: a group with a failed disk is shown as such, and restored only on
// request.
func TestIncompleteGroup(t *testing.T) {
	t.Parallel()
	env, dir, disks := newGroupEnv(t)
	root, data := filepath.Join(dir, "root.img"), filepath.Join(dir, "data.img")
	mustRun(t, env, "backup", root, data, "--volume", "shop/vm")
	// The second disk is read after the first is recorded: it fails if it shrinks in between.
	if err := os.WriteFile(data, disks["root"][:5], 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, env, exitRefused, "no recovery point of the group was made", "backup", root, data, "--volume", "shop/vm")
	if n := countPoints(t, env); n != 2 {
		t.Fatalf("%d points", n)
	}
	// A run that died between two members, or one whose point was deleted by an older Varve.
	if err := os.WriteFile(data, disks["data"], 0o600); err != nil {
		t.Fatal(err)
	}
	made := jsonOf[groupResult](t, env, "backup", root, data, "--volume", "shop/vm")
	loseManifest(t, env, made.Points[1].ID)
	list := jsonOf[[]groupView](t, env, "list", "--groups")
	if len(list) != 2 || !list[0].Complete || list[1].Complete || len(list[1].Missing) != 1 || list[1].Missing[0] != "shop/vm-data" || list[1].Consistency != "none" {
		t.Fatalf("listed %+v", list)
	}
	if out := mustRun(t, env, "list").stdout; strings.Count(out, "incomplete group shop/vm") != 1 {
		t.Errorf("list:\n%s", out)
	}
	out := filepath.Join(dir, "out")
	refused(t, env, exitDamaged, "--incomplete", "restore", "--group", "shop/vm@latest", out)
	refused(t, env, exitDamaged, "incomplete", "verify", "--group", "shop/vm@latest")
	mustRun(t, env, "restore", "--group", "shop/vm@latest", out, "--incomplete")
	if got, err := os.ReadFile(filepath.Join(out, "vm-root.img")); err != nil || !bytes.Equal(got, disks["root"]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	mustRun(t, env, "restore", "--group", "shop/vm@latest~1", filepath.Join(dir, "whole"))
}

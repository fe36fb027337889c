package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// TestRepoRepair loses the whole index of a repository.
func TestRepoRepair(t *testing.T) {
	env := newTestEnv(t)
	dir := filepath.Join(env["HOME"], "backups")
	mustRun(t, env, "repo", "create", "filesystem", "--path", dir)
	disk := filepath.Join(env["HOME"], "disk.img")
	if err := os.WriteFile(disk, []byte(strings.Repeat("some bytes ", 100_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, env, "backup", disk, "--volume", "shop/db")
	if r := mustRun(t, env, "repo", "repair"); !strings.Contains(r.stdout, "Nothing to repair") {
		t.Errorf("a whole repository: %s", r.stdout)
	}
	index := filepath.Join(dir, "x")
	if _, err := os.Stat(index); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(index); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(env["HOME"], ".cache")); err != nil {
		t.Fatal(err)
	}
	if r := runVarve(t, env, "list"); r.code != exitDamaged && r.code != exitRepository || !strings.Contains(r.stderr, "varve repo repair") {
		t.Errorf("without an index: %+v", r)
	}
	if r := runVarve(t, env, "repo", "repair", "--accept-loss"); r.code != exitUsage {
		t.Errorf("--accept-loss without --apply: %+v", r)
	}
	if r := mustRun(t, env, "repo", "repair"); !strings.Contains(r.stdout, "would be listed again") || !strings.Contains(r.stdout, "Nothing was changed") {
		t.Errorf("a trial: %s", r.stdout)
	}
	var res repairResult
	if err := json.Unmarshal([]byte(mustRun(t, env, "repo", "repair", "--apply", "-o", "json").stdout), &res); err != nil {
		t.Fatal(err)
	}
	if !res.Applied || len(res.Back) != 1 || len(res.Damaged)+len(res.Missing) > 0 {
		t.Errorf("%+v", res)
	}
	mustRun(t, env, "verify", "--read", "100%")
	mustRun(t, env, "backup", disk, "--volume", "shop/db")
}

func TestJoinProblems(t *testing.T) {
	const lost = "object 0123456789abcdef0123456789abcdef: content missing: pack p0123456789abcdef01234567-s0123456789 is gone"
	same := strings.ReplaceAll(lost, "0123", "4567")
	in := []verifyProblem{
		{Offset: 0, Length: 10, Error: lost}, {Offset: 10, Length: 5, Error: same}, {Offset: 15, Length: 5, Error: "other"},
		{Offset: 30, Length: 5, Error: "other"}, {Offset: 35, Length: 5, Error: "other"},
	}
	want := []problemRange{
		{verifyProblem{Offset: 0, Length: 15, Error: lost}, 2}, {verifyProblem{Offset: 15, Length: 5, Error: "other"}, 1},
		{verifyProblem{Offset: 30, Length: 10, Error: "other"}, 2},
	}
	if got := joinProblems(in); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

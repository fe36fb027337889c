package main

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/mounttest"
)

// newChainEnv is a user with n points of shop/db.
func newChainEnv(t *testing.T, n int) (env testEnv, names []string) {
	t.Helper()
	env, disk := newBackupEnv(t)
	for i := range n {
		if i > 0 {
			changeByte(t, disk, int64(i)*100_000)
		}
		names = append(names, backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K").Name)
	}
	return env, names
}

func fromJSON[T any](t *testing.T, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return v
}

func TestListAndShow(t *testing.T) {
	env, names := newChainEnv(t, 2)
	out := mustRun(t, env, "list").stdout
	for _, n := range names {
		if !strings.Contains(out, n) {
			t.Errorf("%s is not listed:\n%s", n, out)
		}
	}
	views := fromJSON[[]pointView](t, mustRun(t, env, "list", "--volume", "shop/db", "-o", "json").stdout)
	if len(views) != 2 || views[1].Parent != views[0].ID || views[1].Kind != "incremental" {
		t.Errorf("listed %+v", views)
	}
	out = mustRun(t, env, "show", "shop/db@latest").stdout
	if !strings.Contains(out, names[1]) || !strings.Contains(out, "incremental") {
		t.Errorf("shown:\n%s", out)
	}
	res := fromJSON[showResult](t, mustRun(t, env, "show", views[0].ID[:8], "-o", "json").stdout)
	if res.Record == nil || res.Record.ID != views[0].ID {
		t.Errorf("shown %+v", res)
	}
	if views := fromJSON[[]pointView](t, mustRun(t, env, "list", "shop/db", "-o", "json").stdout); len(views) != 2 {
		t.Errorf("listed by argument %+v", views)
	}
	for _, args := range [][]string{{"list", "--volume", "shop/none"}, {"show", "shop/none@latest"}, {"show", "shop/db@latest~7"}, {"show", "shop/db"}} {
		if r := runVarve(t, env, args...); r.code != exitNotFound || !strings.Contains(r.stderr, "no such recovery point") {
			t.Errorf("%v: exit code %d, %s", args, r.code, r.stderr)
		}
	}
}

func TestDiffCommand(t *testing.T) {
	env, _ := newChainEnv(t, 2)
	out := mustRun(t, env, "diff", "shop/db@latest~1", "shop/db@latest", "-o", "json").stdout
	first, last, _ := strings.Cut(out, "\n")
	e := fromJSON[diffExtent](t, first)
	if end := fromJSON[diffEnd](t, last); end != (diffEnd{End: true, Count: 1, Bytes: 65536}) {
		t.Errorf("ends in %+v", end)
	}
	if out := mustRun(t, env, "diff", "shop/db@latest", "shop/db@latest", "-o", "json").stdout; fromJSON[diffEnd](t, out) != (diffEnd{End: true}) {
		t.Errorf("a point differs from itself: %s", out)
	}
	if e.Offset != 65536 || e.Length != 65536 || e.Zero {
		t.Errorf("differs at %+v", e)
	}
	if out := mustRun(t, env, "diff", "shop/db@latest", "shop/db@latest").stdout; !strings.HasPrefix(out, "0 ranges") {
		t.Errorf("a point differs from itself: %s", out)
	}
}

func TestPinForgetPruneMaintenance(t *testing.T) {
	env, names := newChainEnv(t, 5)
	mustRun(t, env, "pin", names[0], "audit")
	if r := runVarve(t, env, "forget", names[0]); r.code != exitRefused || !strings.Contains(r.stderr, "audit") {
		t.Errorf("forget a pinned point: exit code %d, %s", r.code, r.stderr)
	}
	mustRun(t, env, "forget", names[1], "--dry-run")
	mustRun(t, env, "forget", names[1])
	if r := runVarve(t, env, "prune"); r.code != exitUsage || !strings.Contains(r.stderr, "--keep-daily") {
		t.Errorf("prune without a policy: exit code %d, %s", r.code, r.stderr)
	}
	plan := fromJSON[pruneResult](t, mustRun(t, env, "prune", "--keep-latest", "1", "-n", "-o", "json").stdout)
	if !plan.DryRun || len(plan.Volumes) != 1 || len(plan.Volumes[0].Points) != 4 {
		t.Fatalf("plan %+v", plan)
	}
	for i, want := range []bool{true, false, false, true} {
		if p := plan.Volumes[0].Points[i]; p.Keep != want || (len(p.Reasons) > 0) != want {
			t.Errorf("%s: %+v", p.Name, p)
		}
	}
	out := mustRun(t, env, "prune", "--keep-latest", "1").stdout
	if !strings.Contains(out, "pinned: audit") || strings.Count(out, "no rule keeps it") != 2 || !strings.Contains(out, "2 recovery points kept, 2 deleted") {
		t.Errorf("pruned:\n%s", out)
	}
	mustRun(t, env, "unpin", names[0], "--all")
	res := fromJSON[maintenanceResult](t, mustRun(t, env, "maintenance", "run", "--full", "--safety=none", "-o", "json").stdout)
	if res.Mode != "full" || res.Unused.Count == 0 || res.Reclaimed.Bytes == 0 {
		t.Errorf("maintenance %+v", res)
	}
	st := fromJSON[maintenanceStatus](t, mustRun(t, env, "maintenance", "status", "-o", "json").stdout)
	if !st.OwnedHere || st.Full.Last.IsZero() || st.Full.Overdue || st.Reclaimed == 0 {
		t.Errorf("status %+v", st)
	}
	if out := mustRun(t, env, "maintenance", "run").stdout; !strings.Contains(out, "Nothing is due") {
		t.Errorf("maintenance ran again: %s", out)
	}
	vr := fromJSON[verifyResult](t, mustRun(t, env, "verify", "--read", "100%", "-o", "json").stdout)
	if len(vr.Points) != 2 || !vr.Points[0].OK || vr.Read == 0 {
		t.Errorf("verify %+v", vr)
	}
	if out := mustRun(t, env, "list").stdout; !strings.Contains(out, "verified, 100 % read") {
		t.Errorf("the result is not shown:\n%s", out)
	}
}

// removeBlocks removes the packs of blocks from the storage of an environment.
func removeBlocks(t *testing.T, env testEnv) {
	t.Helper()
	const records = 32 << 10 // packs of records are smaller than this, those of blocks are not
	err := filepath.WalkDir(filepath.Join(env["HOME"], "repo"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Base(filepath.Dir(filepath.Dir(path)))[0] != 'p' {
			return err
		}
		st, err := d.Info()
		if err != nil || st.Size() < records {
			return err
		}
		return os.Remove(path)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestVerifyNamesDamage(t *testing.T) {
	env, disk := newBackupEnv(t)
	data := make([]byte, 1<<20)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(data) // never fails
	if err := os.WriteFile(disk, data, 0o600); err != nil {
		t.Fatal(err)
	}
	first := backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	changeByte(t, disk, 100_000)
	backupJSON(t, env, disk, "--volume", "shop/db")
	removeBlocks(t, env)
	r := runVarve(t, env, "verify", "-o", "json")
	if r.code != exitDamaged || !strings.Contains(r.stderr, first.Name) {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	res := fromJSON[verifyResult](t, r.stdout)
	if len(res.Points) != 2 || res.Points[0].OK || res.Points[0].Problems[0].Object == "" || !strings.Contains(res.Points[0].Problems[0].Error, "pack p") {
		t.Errorf("result %+v", res)
	}
	// Not quarantined yet: a backup on it warns.
	if r := runVarve(t, env, "maintenance", "run", "--full"); r.code != exitDamaged || !strings.Contains(r.stdout, "in use, but lost") || !strings.Contains(r.stderr, "--quarantine") {
		t.Errorf("maintenance: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	if r := runVarve(t, env, "restore", first.Name, filepath.Join(env["HOME"], "back.img")); r.code != exitDamaged || !strings.Contains(r.stderr, "--salvage") {
		t.Errorf("restore: exit code %d: %s", r.code, r.stderr)
	}
	if b := backupJSON(t, env, disk, "--volume", "shop/db"); len(b.Notes) != 1 || !strings.Contains(b.Notes[0], "found damaged") {
		t.Errorf("a backup on a damaged point: %+v", b)
	}
	// A damaged point replaces no other.
	plan := fromJSON[pruneResult](t, mustRun(t, env, "prune", "--keep-latest", "1", "-n", "-o", "json").stdout)
	for i, p := range plan.Volumes[0].Points {
		if whole := i == 2; !p.Keep || strings.Contains(strings.Join(p.Reasons, " "), "damaged") == whole {
			t.Errorf("prune: %+v", p)
		}
	}
	if r := runVarve(t, env, "verify", "--quarantine"); r.code != exitDamaged || !strings.Contains(r.stdout, "stored again") {
		t.Errorf("exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	if out := mustRun(t, env, "list").stdout; !strings.Contains(out, "quarantined") {
		t.Errorf("the quarantine is not shown:\n%s", out)
	}
	// The disk still has the bytes: a backup repairs the point that holds the same.
	mustRun(t, env, "backup", disk, "--volume", "shop/db", "--full", "--block-size", "64K")
	out := runVarve(t, env, "verify", "shop/db@latest~2", "--read", "100%")
	if out.code != exitOK || !strings.Contains(out.stdout, "whole again") {
		t.Errorf("exit code %d: %s%s", out.code, out.stdout, out.stderr)
	}
}

// TestVerifyOfReadOnlyStorage: verify reports its findings, whether or not they can be
// stored.
func TestVerifyOfReadOnlyStorage(t *testing.T) {
	env, disk := newBackupEnv(t)
	data := make([]byte, 1<<20)
	rng := rand.NewChaCha8([32]byte{2})
	_, _ = rng.Read(data) // never fails
	if err := os.WriteFile(disk, data, 0o600); err != nil {
		t.Fatal(err)
	}
	p := backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	setReadOnly := mountOver(t, filepath.Join(env["HOME"], "repo"))
	setReadOnly(true)
	r := runVarve(t, env, "verify")
	if r.code != exitOK || !strings.Contains(r.stdout, "1 recovery point, 0 damaged") || !strings.Contains(r.stderr, "could not be kept") {
		t.Errorf("whole: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	setReadOnly(false)
	removeBlocks(t, env)
	setReadOnly(true)
	r = runVarve(t, env, "verify")
	if r.code != exitDamaged || !strings.Contains(r.stdout, p.Name) || !strings.Contains(r.stdout, "is damaged:") || !strings.Contains(r.stderr, "could not be kept") {
		t.Errorf("damaged: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
}

// mountOver mounts a directory over itself, so that it can be made read-only even
// for root.
func mountOver(t *testing.T, dir string) (setReadOnly func(bool)) {
	t.Helper()
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("cannot mount here: %v", err)
	}
	t.Cleanup(func() { mounttest.Unmount(t, dir) })
	return func(on bool) {
		t.Helper()
		flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT)
		if on {
			flags |= unix.MS_RDONLY
		}
		if err := unix.Mount("", dir, "", flags, ""); err != nil {
			t.Fatalf("remount %s: %v", dir, err)
		}
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// newBackupEnv is a user with a repository and an image file of 1 MiB.
func newBackupEnv(t *testing.T) (env testEnv, disk string) {
	t.Helper()
	env = newTestEnv(t)
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
	disk = filepath.Join(env["HOME"], "disk.img")
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i >> 10)
	}
	if err := os.WriteFile(disk, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return env, disk
}

func changeByte(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("changed"), off); err != nil {
		t.Fatal(err)
	}
}

func backupJSON(t *testing.T, env testEnv, args ...string) backupResult {
	t.Helper()
	var res backupResult
	out := mustRun(t, env, append([]string{"backup", "-o", "json"}, args...)...).stdout
	if err := json.Unmarshal([]byte(out), &res); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return res
}

func TestBackupTakesAFullThenIncrements(t *testing.T) {
	env, disk := newBackupEnv(t)
	first := backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	if first.Kind != "full" || first.Generation != 1 || first.Stats.Changed == 0 {
		t.Errorf("first backup: %+v", first)
	}
	changeByte(t, disk, 300_000)
	second := backupJSON(t, env, disk, "--volume", "shop/db")
	if second.Kind != "incremental" || second.Parent != first.ID || second.Stats.Changed != 64<<10 {
		t.Errorf("second backup: %+v", second)
	}
	third := backupJSON(t, env, disk, "--volume", "shop/db", "--full")
	if third.Kind != "full" || third.Generation != 3 || third.Stats.Uploaded > 64<<10 {
		t.Errorf("third backup: %+v", third)
	}
}

func TestBackupFromExtents(t *testing.T) {
	env, disk := newBackupEnv(t)
	list := filepath.Join(env["HOME"], "changes")
	write := func(base, target string, lines ...string) {
		t.Helper()
		if base == "" {
			base = "null"
		} else {
			base = strconv.Quote(base)
		}
		head := fmt.Sprintf(`{"format":"varve-extents/1","base":%s,"target":%q,"size":%d}`, base, target, 1<<20)
		tail := fmt.Sprintf(`{"end":true,"count":%d}`, len(lines))
		text := strings.Join(append(append([]string{head}, lines...), tail), "\n") + "\n"
		if err := os.WriteFile(list, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("", "snap-1", `{"offset":0,"length":1048576}`)
	mustRun(t, env, "backup", disk, "--volume", "shop/db", "--extents", list)

	changeByte(t, disk, 500_000)
	write("snap-0", "snap-2", `{"offset":499712,"length":4096}`)
	r := runVarve(t, env, "backup", disk, "--volume", "shop/db", "--extents", list)
	if r.code != exitRefused || !strings.Contains(r.stderr, "snap-0") || !strings.Contains(r.stderr, "snap-1") {
		t.Errorf("a list with another base: exit code %d\n%s", r.code, r.stderr)
	}

	write("snap-1", "snap-2", `{"offset":499712,"length":4096}`)
	res := backupJSON(t, env, disk, "--volume", "shop/db", "--extents", list)
	if res.Source != "extents" || res.Stats.Reported != 4096 || res.SpotCheck == nil {
		t.Errorf("backup from extents: %+v", res)
	}

	changeByte(t, disk, 100)
	write("snap-2", "snap-3", `{"offset":499712,"length":4096}`)
	r = runVarve(t, env, "backup", disk, "--volume", "shop/db", "--extents", list)
	if r.code != exitRefused || !strings.Contains(r.stderr, "did not report") || !strings.Contains(r.stderr, "--on-mismatch=full") {
		t.Errorf("a list that leaves out a change: exit code %d\n%s", r.code, r.stderr)
	}
	res = backupJSON(t, env, disk, "--volume", "shop/db", "--extents", list, "--on-mismatch=full")
	if res.Source != "compare" || len(res.Notes) != 1 || len(res.Fallbacks) != 1 || strings.Contains(res.Fallbacks[0].Detail, "nothing was recorded") {
		t.Errorf("backup after a lie: %+v", res)
	}
	changeByte(t, disk, 900_000)
	write("snap-3", "snap-4", `{"offset":499712,"length":4096}`)
	if r = mustRun(t, env, "backup", disk, "--volume", "shop/db", "--extents", list, "--on-mismatch=full"); strings.Contains(r.stdout, "spot check") {
		t.Errorf("a check that was not done is told of:\n%s", r.stdout)
	}
	if err := os.WriteFile(list, []byte(`{"base":"snap-4","target":"snap-5","size":1048576}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r = runVarve(t, env, "backup", disk, "--volume", "shop/db", "--extents", list); r.code != exitRefused || !strings.Contains(r.stderr, "cut off") {
		t.Errorf("a list that was cut off: exit code %d\n%s", r.code, r.stderr)
	}
}

func TestBackupRefusals(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db")
	for _, c := range []struct {
		name string
		args []string
		want string
		code int
	}{
		{"no volume", []string{disk}, "volume", exitUsage},
		{"bad volume", []string{disk, "--volume", "shop"}, "namespace/name", exitUsage},
		{"missing source", []string{disk + "x", "--volume", "shop/db"}, "no such file", exitFailure},
		{"parent of another volume", []string{disk, "--volume", "shop/web", "--parent", "shop/db@latest"}, "is a point of", exitRefused},
		{"another block size", []string{disk, "--volume", "shop/db", "--block-size", "1M"}, "take a new full", exitRefused},
		{"a directory", []string{env["HOME"], "--volume", "shop/db"}, "neither a block device", exitUsage},
		{"a bad volume", []string{disk, "--volume", "shop/db/1"}, `volume shop/db/1: name "db/1"`, exitUsage},
		{"a bad block size", []string{disk, "--volume", "shop/db", "--block-size", "3K"}, "--block-size", exitUsage},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := runVarve(t, env, append([]string{"backup"}, c.args...)...)
			if r.code != c.code || !strings.Contains(r.stderr, c.want) {
				t.Errorf("exit code %d, want %d\n%s", r.code, c.code, r.stderr)
			}
		})
	}
}

// TestBackupTakesListsOfTools backs up by what qemu-img and rbd print.
func TestBackupTakesListsOfTools(t *testing.T) {
	diskfstest.NeedTool(t, "qemu-img")
	env, disk := newBackupEnv(t)
	if err := os.Truncate(disk, 3<<20); err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(env["HOME"], "map.json")
	allocated, err := exec.Command("qemu-img", "map", "--output=json", "-f", "raw", disk).Output()
	if err != nil {
		t.Fatal(err)
	}
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(list, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(allocated)
	r := runVarve(t, env, "backup", disk, "--volume", "shop/db", "--extents", list)
	if r.code != exitUsage || !strings.Contains(r.stderr, "--extents-target") {
		t.Errorf("a list that names no states: exit %d: %s", r.code, r.stderr)
	}
	first := backupJSON(t, env, disk, "--volume", "shop/db", "--extents", list, "--extents-target", "snap-1", "--block-size", "64K")
	if first.Source != "extents" || first.Stats.Changed != 1<<20 {
		t.Errorf("a full by what is allocated: %+v", first)
	}
	changeByte(t, disk, 2<<20+5)
	write([]byte(`[{"offset":2097152,"length":4096,"exists":"true"}]`))
	second := backupJSON(t, env, disk, "--volume", "shop/db", "--extents", list,
		"--extents-format", "rbd", "--extents-base", "snap-1", "--extents-target", "snap-2")
	if second.Kind != "incremental" || second.Stats.Reported != 4096 {
		t.Errorf("an increment by what changed: %+v", second)
	}
	back := filepath.Join(env["HOME"], "back.img")
	mustRun(t, env, "restore", "shop/db@latest", back)
	if got, want := mustRead(t, back), mustRead(t, disk); !bytes.Equal(got, want) {
		t.Error("the restored disk differs")
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A disk beyond the format's limit is refused with its size; /dev/shm can hold a sparse file
// of any size.
func TestBackupOfTooLargeDisk(t *testing.T) {
	env, _ := newBackupEnv(t)
	f, err := os.CreateTemp("/dev/shm", "varve-test-")
	if err != nil {
		t.Skip("no /dev/shm for a file of 8 EiB: ", err)
	}
	t.Cleanup(func() { _ = os.Remove(f.Name()) })
	if err := errors.Join(f.Truncate(1<<63-1), f.Close()); err != nil {
		t.Skip("/dev/shm takes no file of 8 EiB: ", err)
	}
	r := runVarve(t, env, "backup", f.Name(), "--volume", "shop/big")
	if r.code != exitRefused || !strings.Contains(r.stderr, "disks of more than 1 EiB are not supported: the disk has 8 EiB (9223372036854775807 bytes); no point was made") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
}

// A missing volume has one exit code, whether or not its name is valid.
func TestListOfNoVolume(t *testing.T) {
	env, _ := newBackupEnv(t)
	for _, name := range []string{"nosuch", "nosuch/volume"} {
		if r := runVarve(t, env, "list", "--volume", name); r.code != exitNotFound || !strings.Contains(r.stderr, "no such recovery point") {
			t.Errorf("%s: exit code %d: %s", name, r.code, r.stderr)
		}
	}
}

// Disk images of other programs are listed with the same flag as they are served and mounted with.
func TestListForeign(t *testing.T) {
	env, disk := newBackupEnv(t)
	mustRun(t, env, "backup", disk, "--volume", "shop/db")
	for _, flag := range []string{"--foreign", "--all"} {
		if out := mustRun(t, env, "list", flag).stdout; !strings.Contains(out, "shop/db@") {
			t.Errorf("%s: %s", flag, out)
		}
	}
}

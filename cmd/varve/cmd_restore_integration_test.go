package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets a test run this binary as varve itself, in a process that can
// be killed.
func TestMain(m *testing.M) {
	// Kernel mounts and frozen guests start this program again, with an almost empty environment.
	aside := len(os.Args) > 1 && (os.Args[1] == mountWatchName || os.Args[1] == mountLoopName || os.Args[1] == guestFreezeName)
	if os.Getenv("VARVE_TEST_AS_MAIN") != "" || aside {
		main()
		return
	}
	code := m.Run()
	if builtVarveDir != "" {
		_ = os.RemoveAll(builtVarveDir)
	}
	os.Exit(code)
}

// varveProcess starts varve in a separate process.
func varveProcess(t *testing.T, env testEnv, args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	t.Helper()
	cmd, stdout, stderr = varveCommand(t, env, args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, stdout, stderr
}

// varveCommand is varve as a separate process, to be started.
func varveCommand(t *testing.T, env testEnv, args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.CommandContext(t.Context(), self, args...)
	cmd.Env = []string{"VARVE_TEST_AS_MAIN=1", "PATH=" + os.Getenv("PATH")}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	stdout, stderr = &bytes.Buffer{}, &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	return cmd, stdout, stderr
}

func restoreJSON(t *testing.T, env testEnv, args ...string) restoreResult {
	t.Helper()
	return parseRestore(t, mustRun(t, env, append([]string{"restore", "-o", "json"}, args...)...).stdout)
}

func parseRestore(t *testing.T, out string) restoreResult {
	t.Helper()
	var res restoreResult
	if err := json.Unmarshal([]byte(out), &res); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return res
}

func sameFiles(t *testing.T, got, want string) {
	t.Helper()
	a, err := os.ReadFile(got)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Fatalf("%s is not %s", got, want)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	p, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, p, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestRestoreCommand(t *testing.T) {
	env, disk := newBackupEnv(t)
	dir := env["HOME"]
	old, target := filepath.Join(dir, "old.img"), filepath.Join(dir, "target.img")
	backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	copyFile(t, disk, old)
	changeByte(t, disk, 300_000)
	backupJSON(t, env, disk, "--volume", "shop/db")

	res := restoreJSON(t, env, "shop/db@latest~1", target, "--verify")
	sameFiles(t, target, old)
	if res.Mode != "full" || res.Verified != 1<<20 {
		t.Errorf("full: %+v", res)
	}
	res = restoreJSON(t, env, "shop/db@latest", target, "--delta", "--base", "shop/db@latest~1", "--verify")
	sameFiles(t, target, disk)
	if res.Mode != "delta" || res.Written != 64<<10 || res.Checked == 0 {
		t.Errorf("delta: %+v", res)
	}
	changeByte(t, target, 900_000)
	res = restoreJSON(t, env, "shop/db@latest~1", target, "--delta")
	sameFiles(t, target, old)
	if res.Mode != "compare" || res.Written != 128<<10 {
		t.Errorf("compare: %+v", res)
	}
	want, err := os.ReadFile(old)
	if err != nil {
		t.Fatal(err)
	}
	if out := mustRun(t, env, "restore", "shop/db@latest~1", "-").stdout; out != string(want) {
		t.Error("standard output differs")
	}
	// An existing file is neither replaced nor truncated without --overwrite.
	if r := runVarve(t, env, "restore", "shop/db@latest", target); r.code != exitRefused || !strings.Contains(r.stderr, "--overwrite") {
		t.Errorf("over a file that exists: exit code %d, %s", r.code, r.stderr)
	}
	sameFiles(t, target, old)
	empty := filepath.Join(dir, "empty.img")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, env, "restore", "shop/db@latest", empty)
	sameFiles(t, empty, disk)
	if out := mustRun(t, env, "restore", "shop/db@latest", target, "--overwrite").stdout; !strings.Contains(out, "restored shop/db@") {
		t.Errorf("printed %q", out)
	}
}

func TestRestoreCommandRefuses(t *testing.T) {
	env, disk := newBackupEnv(t)
	dir := env["HOME"]
	backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	copyFile(t, disk, filepath.Join(dir, "other.img"))
	for i := range int64(16) {
		changeByte(t, filepath.Join(dir, "other.img"), i<<16+99)
	}
	for _, c := range []struct {
		code int
		says string
		args []string
	}{
		{exitUsage, "--delta", []string{"shop/db@latest", "x", "--base", "shop/db@latest"}},
		{exitUsage, "--base", []string{"shop/db@latest", "x", "--delta", "--changed", "-"}},
		{exitUsage, "read back", []string{"shop/db@latest", "-", "--verify"}},
		{exitUsage, "does not exist", []string{"shop/db@latest", filepath.Join(dir, "none"), "--delta"}},
		{exitNotFound, "shop/nothing", []string{"shop/nothing@latest", "x"}},
		{exitFailure, "attached", []string{"shop/db@latest", "/dev/no-such-disk"}},
		{exitRefused, "were not listed as changed", []string{"shop/db@latest", filepath.Join(dir, "other.img"), "--delta", "--base", "shop/db@latest"}},
	} {
		r := runVarve(t, env, append([]string{"restore"}, c.args...)...)
		if r.code != c.code || !strings.Contains(r.stderr, c.says) {
			t.Errorf("restore %v: exit code %d, %s", c.args, r.code, r.stderr)
		}
	}
}

// TestRestoreWithoutStateDirectory: a restore works without its journal, and a refused
// restore leaves nothing.
func TestRestoreWithoutStateDirectory(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	target := filepath.Join(env["HOME"], "target.img")
	env["XDG_STATE_HOME"] = disk // a file
	if r := mustRun(t, env, "restore", "shop/db@latest", target); !strings.Contains(r.stderr, "XDG_STATE_HOME") {
		t.Errorf("nothing was said: %s", r.stderr)
	}
	sameFiles(t, target, disk)

	env["XDG_STATE_HOME"] = t.TempDir()
	a := newApp()
	a.lookupEnv = func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	fresh := filepath.Join(env["HOME"], "fresh.img")
	journal, err := a.restoreJournal(fresh)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(journal), 0o700); err != nil {
		t.Fatal(err)
	}
	running, err := os.Create(journal)
	if err != nil {
		t.Fatal(err)
	}
	defer running.Close()
	if err := unix.Flock(int(running.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if r := runVarve(t, env, "restore", "shop/db@latest", fresh); r.code != exitRefused {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if _, err := os.Stat(fresh); err == nil {
		t.Error("an empty file is left behind")
	}
}

// writtenBy returns how many bytes a process has passed to write calls.
func writtenBy(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0
	}
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		if text, ok := strings.CutPrefix(sc.Text(), "wchar: "); ok {
			n, _ := strconv.ParseInt(text, 10, 64)
			return n
		}
	}
	return 0
}

// TestKilledRestore kills restores at random moments, then lets one finish.
func TestKilledRestore(t *testing.T) {
	t.Parallel()
	env := newTestEnv(t)
	dir := env["HOME"]
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(dir, "repo"))
	disk, target := filepath.Join(dir, "disk.img"), filepath.Join(dir, "target.img")
	const size = 256 << 20
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	data := make([]byte, size)
	for i := 0; i < size; i += 4096 {
		if i/(1<<20)%7 == 3 {
			continue // a MiB of zeroes
		}
		for j := range 32 { // compressible, so that the restore dominates
			data[i+j] = byte(rng.Uint32())
		}
		copy(data[i+32:i+4096], bytes.Repeat(data[i:i+32], 127))
	}
	if err := os.WriteFile(disk, data, 0o600); err != nil {
		t.Fatal(err)
	}
	backupJSON(t, env, disk, "--volume", "shop/db")

	const kills = 10
	before, resumed := int64(0), int64(0) // bytes written before the next run to be killed
	killed := 0
	most := int64(110 << 20) // a restore is killed after it wrote at most this many bytes and 4 MiB
	for killed < kills {
		cmd, stdout, stderr := varveProcess(t, env, "restore", "shop/db@latest", target, "--workers", "2", "-o", "json")
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		limit := 4<<20 + rng.Int64N(most)
		written, running, failed := int64(0), true, error(nil)
		for written < limit && running {
			written = max(written, writtenBy(cmd.Process.Pid))
			select {
			case failed = <-ended:
				running = false
			case <-time.After(time.Millisecond):
			}
		}
		if running {
			if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
			failed = <-ended
		} else if failed != nil {
			t.Fatalf("restore: %v\n%s", failed, stderr)
		}
		now, journal := journaled(t, env)
		if failed == nil && killed >= 2 {
			resumed = parseRestore(t, stdout.String()).Resumed
			break
		}
		if failed == nil || !journal {
			// It was done before this process, which got a processor too late, could kill it: again from the
			// first byte, and sooner.
			sameFiles(t, target, disk)
			if err := os.Remove(target); err != nil {
				t.Fatal(err)
			}
			before, killed, most = 0, 0, max(most/2, 1)
			continue
		}
		killed++
		if now < before+written-64<<20 {
			t.Errorf("killed after %d bytes on top of %d, and only %d of them count", written, before, now)
		}
		before = now
	}
	if killed == kills {
		res := restoreJSON(t, env, "shop/db@latest", target, "--verify")
		resumed = res.Resumed
	}
	if resumed < before {
		t.Errorf("resumed at %d, the journal had %d", resumed, before)
	}
	sameFiles(t, target, disk)
}

// journaled returns how much the only journal lists as done, and whether there is one.
func journaled(t *testing.T, env testEnv) (int64, bool) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(env["HOME"], ".local/state/varve/restore-*.journal"))
	if err != nil || len(names) > 1 {
		t.Fatalf("journals: %v, %v", names, err)
	}
	if len(names) == 0 {
		return 0, false
	}
	b, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	n := int64(0)
	for line := range strings.Lines(string(b)) {
		var first, last int64
		if k, _ := fmt.Sscanf(line, "w %d %d", &first, &last); k == 2 {
			n += (last - first + 1) * 4 << 20
		}
	}
	return n, true
}

// TestRestoreToAClosedOutput: a standard output that the shell closed (restore POINT - >&-)
// is an error.
func TestRestoreToAClosedOutput(t *testing.T) {
	env, disk := newBackupEnv(t)
	mustRun(t, env, "backup", disk, "--volume", "shop/db")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for redirect, want := range map[string]int{">&-": exitFailure, ">/dev/null": exitOK} {
		cmd := exec.Command("/bin/sh", "-c", "exec "+self+" restore shop/db@latest - "+redirect)
		cmd.Env = append(env.list(), "VARVE_TEST_AS_MAIN=1", "PATH="+os.Getenv("PATH"))
		out, _ := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != want || (code != exitOK) != strings.Contains(string(out), "standard output is closed") {
			t.Errorf("restore - %s: exit %d: %s", redirect, code, out)
		}
	}
}

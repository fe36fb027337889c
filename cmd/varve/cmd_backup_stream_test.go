package main

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/internal/progress"
)

// runPiped is runVarve with something on standard input.
func runPiped(t *testing.T, env testEnv, in []byte, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	a := &app{
		stdin: bytes.NewReader(in), stdout: &stdout, stderr: &stderr,
		lookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
		log:       slog.New(slog.DiscardHandler),
		progress:  progress.New(progress.Options{}),
	}
	return result{a.run(t.Context(), args), stdout.String(), stderr.String()}
}

// TestStreamCommands: a stream is backed up from a pipe and from a command, and restored;
// commands for disks refuse it.
func TestStreamCommands(t *testing.T) {
	t.Parallel()
	env, disk := newBackupEnv(t)
	dir := env["HOME"]
	data := bytes.Repeat([]byte("insert into orders values (1, 'x');\n"), 40_000)
	piped := func(code int, part string, in []byte, args ...string) {
		t.Helper()
		if r := runPiped(t, env, in, args...); r.code != code || !strings.Contains(r.stdout+r.stderr, part) {
			t.Errorf("varve %s: exit code %d, want %d and %q: %s%s", strings.Join(args, " "), r.code, code, part, r.stdout, r.stderr)
		}
	}
	piped(exitOK, "stream shop/dump@", data, "backup", "-", "--volume", "shop/dump")
	piped(exitOK, "stream shop/dump@", data, "backup", "-", "--volume", "shop/dump", "--expect-bytes", "1440000")
	piped(exitRefused, "no point was made", data[:5000], "backup", "-", "--volume", "shop/dump", "--expect-bytes", "1440000")
	piped(exitRefused, "no point was made", data, "backup", "-", "--volume", "shop/dump", "--expect-bytes", "5000")
	piped(exitRefused, "empty", nil, "backup", "-", "--volume", "shop/dump")
	if got := mustRun(t, env, "restore", "shop/dump@latest", "-").stdout; got != string(data) {
		t.Errorf("%d bytes came back", len(got))
	}
	if got := mustRun(t, env, "cat", "shop/dump@latest").stdout; got != string(data) {
		t.Errorf("cat: %d bytes", len(got))
	}
	file := filepath.Join(dir, "dump.sql")
	mustRun(t, env, "restore", "shop/dump@latest", file, "--verify")
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if out := mustRun(t, env, "list").stdout + mustRun(t, env, "show", "shop/dump@latest").stdout; strings.Count(out, "stream") < 3 {
		t.Errorf("list and show:\n%s", out)
	}
	mustRun(t, env, "verify", "shop/dump@latest", "--read", "100%")

	// A command: its output is kept if it succeeds.
	sh := func(script string) []string {
		return []string{"backup", "--exec", "--volume", "shop/dump", "--", "sh", "-c", script}
	}
	mustRun(t, env, sh("cat "+file+"; echo warned >&2")...)
	if r := runVarve(t, env, sh("cat "+file+"; echo broken >&2; exit 3")...); r.code != exitFailure || !strings.Contains(r.stderr, "exit status 3") || !strings.Contains(r.stderr, "no point was made") {
		t.Errorf("a command that fails: %+v", r)
	}
	refused(t, env, exitFailure, "no point was made", sh("cat "+file+"; kill -9 $$")...)
	refused(t, env, exitFailure, "no-such-program", "backup", "--exec", "--volume", "shop/dump", "--", "no-such-program")
	refused(t, env, exitRefused, "empty", sh("exit 0")...)
	// A command that does not end is ended with the backup.
	refused(t, env, exitRefused, "more than", append([]string{"backup", "--expect-bytes", "1000", "--exec", "--volume", "shop/dump", "--"}, "sh", "-c", "yes")...)
	if n := countPoints(t, env); n != 3 {
		t.Errorf("%d points, want 3", n)
	}

	// Commands for disks say that this is none.
	const none = "holds a stream"
	mustRun(t, env, "backup", disk, "--volume", "shop/db")
	for _, args := range [][]string{
		{"ls", "shop/dump@latest:/"}, {"tree", "shop/dump@latest"}, {"find", "shop/dump@latest"}, {"stat", "shop/dump@latest:/x"},
		{"cp", "shop/dump@latest:/x", dir}, {"cat", "shop/dump@latest:/x"}, {"diff", "shop/dump@latest", "shop/dump@latest~1"},
		{"serve", "--listen", "unix:" + filepath.Join(dir, "sock"), "shop/dump@latest"}, {"serve", "--listen", "unix:" + filepath.Join(dir, "sock"), "shop/dump"},
		{"restore", "shop/dump@latest", file, "--delta"}, {"restore", "shop/db@latest", disk, "--delta", "--base", "shop/dump@latest"},
	} {
		refused(t, env, exitUsage, none, args...)
	}
	refused(t, env, exitRefused, "holds streams", "backup", disk, "--volume", "shop/dump")
	piped(exitRefused, "holds disks", data, "backup", "-", "--volume", "shop/db")
	for _, args := range [][]string{
		{"backup", "-", "--volume", "shop/dump", "--full"}, {"backup", "-", disk, "--volume", "shop/dump"}, {"backup", "--exec", "--volume", "shop/dump", "cat", file},
		{"backup", "--exec", "--volume", "shop/dump"}, {"backup", disk, "--volume", "shop/db", "--size", "5"}, {"backup", "-", "--volume", "shop/dump", "--expect-bytes", "0"},
		{"backup", "-", "--volume", "shop/dump", "--size", "5", "--expect-bytes", "5"}, {"backup", "-", "--volume", "shop/dump", "--size", "5", "--extents", file},
	} {
		refused(t, env, exitUsage, "", args...)
	}
}

// TestStreamOfADisk: with --size the bytes are a disk, and increments of it are stored.
func TestStreamOfADisk(t *testing.T) {
	t.Parallel()
	env, disk := newBackupEnv(t)
	data, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"backup", "-", "--volume", "shop/db", "--size", "1M"}
	for _, in := range [][]byte{data[:len(data)-1], append(bytes.Clone(data), 0), nil} {
		if r := runPiped(t, env, in, args...); r.code != exitRefused || !strings.Contains(r.stderr, "no point was made") {
			t.Errorf("%d bytes: %+v", len(in), r)
		}
	}
	for i, kind := range []string{"full", "incremental"} {
		data[700_000+i] ^= 1
		r := runPiped(t, env, data, append(args, "-o", "json")...)
		if r.code != exitOK {
			t.Fatal(r.stderr)
		}
		if res := fromJSON[backupResult](t, r.stdout); res.Kind != kind || res.Content != "" || res.Size != 1<<20 || res.BlockSize == 0 {
			t.Errorf("%+v", res)
		}
		if got := mustRun(t, env, "restore", "shop/db@latest", "-").stdout; got != string(data) {
			t.Error("the disk is another one")
		}
	}
	mustRun(t, env, "diff", "shop/db@latest~1", "shop/db@latest")
}

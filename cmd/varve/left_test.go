package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/progress"
)

// writerFunc is a standard output.
type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// full is a standard output that takes nothing.
var full = writerFunc(func([]byte) (int, error) { return 0, errors.New("it is full") })

// runTo runs one command line with a standard output, which gets a function that interrupts it.
func runTo(t *testing.T, env testEnv, stdout func(interrupt func()) writerFunc, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	var stderr output
	a := &app{
		stdin: strings.NewReader("a stream"), stdout: stdout(func() { cancel(errInterrupted) }), stderr: &stderr,
		lookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
		log:       slog.New(slog.DiscardHandler),
		progress:  progress.New(progress.Options{}),
	}
	code := a.run(ctx, args)
	return result{code: code, stderr: stderr.String()}
}

func toFull(func()) writerFunc { return full }

// interrupted is a standard output at which the command is interrupted.
func interrupted(interrupt func()) writerFunc {
	return func([]byte) (int, error) {
		interrupt()
		return 0, context.Canceled
	}
}

// TestBackupsThatWereMade: an error after the point was made does not hide that.
func TestBackupsThatWereMade(t *testing.T) {
	t.Parallel()
	env, dir, _ := newGroupEnv(t)
	root, data := filepath.Join(dir, "root.img"), filepath.Join(dir, "data.img")
	for name, c := range map[string]struct {
		args []string
		made string
	}{
		"disk":                {[]string{"backup", root, "--volume", "shop/db"}, "recovery point shop/db@"},
		"group":               {[]string{"backup", root, data, "--volume", "shop/vm"}, "the 2 recovery points of group shop/vm were made"},
		"stream":              {[]string{"backup", "-", "--volume", "shop/dump"}, "recovery point shop/dump@"},
		"disk from a stream":  {[]string{"backup", "-", "--size", "8", "--volume", "shop/disk"}, "recovery point shop/disk@"},
		"output of a command": {[]string{"backup", "--exec", "--volume", "shop/out", "--", "echo", "x"}, "recovery point shop/out@"},
		"disk, as JSON":       {[]string{"backup", root, "--volume", "shop/json", "-o", "json"}, "recovery point shop/json@"},
	} {
		if r := runTo(t, env, toFull, c.args...); r.code != exitFailure || !strings.Contains(r.stderr, "it is full; ") || !strings.Contains(r.stderr, c.made) || strings.Contains(r.stderr, "checkpoint") {
			t.Errorf("%s: exit code %d: %s", name, r.code, r.stderr)
		}
	}
	if n := countPoints(t, env); n != 7 {
		t.Errorf("%d points", n)
	}
	r := runTo(t, env, toFull, "restore", "--group", "shop/vm@latest", filepath.Join(dir, "back"))
	if r.code != exitFailure || !strings.Contains(r.stderr, "it is full; 2 of 2 points of the group are restored\n") {
		t.Errorf("restore of a group: exit code %d: %s", r.code, r.stderr)
	}
	r = runTo(t, env, toFull, "restore", "shop/db@latest", filepath.Join(dir, "back.img"))
	if r.code != exitFailure || !strings.Contains(r.stderr, "it is full; all of the disk was written\n") {
		t.Errorf("restore: exit code %d: %s", r.code, r.stderr)
	}
}

// TestWhatARestoreLeaves: errors and interrupts say what is left on the target, and what a
// second run does with it.
func TestWhatARestoreLeaves(t *testing.T) {
	t.Parallel()
	env, dir, disks := newGroupEnv(t)
	mustRun(t, env, "backup", "a="+filepath.Join(dir, "root.img"), "b="+filepath.Join(dir, "data.img"), "--volume", "shop/vm")
	says := func(r result, code int, want string) {
		t.Helper()
		if r.code != code || !strings.HasSuffix(r.stderr, "; "+want+"\n") {
			t.Errorf("exit code %d, want %d and %q: %s", r.code, code, want, r.stderr)
		}
	}
	holds := func(path, disk string) {
		t.Helper()
		if got := mustRead(t, path); !bytes.Equal(got, disks[disk]) {
			t.Errorf("%s: %d bytes", path, len(got))
		}
	}
	const discard = "what was written to standard output is incomplete: discard it"
	says(runTo(t, env, interrupted, "restore", "shop/vm-a@latest", "-"), exitInterrupted, discard)
	says(runTo(t, env, toFull, "restore", "shop/vm-a@latest", "-"), exitFailure, discard)

	// Files of more than 250,000 bytes cannot be written.
	limited := func(limit string, args ...string) result {
		t.Helper()
		diskfstest.NeedTool(t, "prlimit")
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "prlimit", append([]string{"--fsize=" + limit, self}, args...)...)
		cmd.Env = append(env.list(), "VARVE_TEST_AS_MAIN=1", "PATH="+os.Getenv("PATH"))
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		_ = cmd.Run()
		return result{code: cmd.ProcessState.ExitCode(), stderr: stderr.String()}
	}
	one := filepath.Join(dir, "one.img")
	says(limited("250000", "restore", "shop/vm-b@latest", one), exitFailure, "the target is incomplete; run the same command again to continue")
	mustRun(t, env, "restore", "shop/vm-b@latest", one)
	holds(one, "data")

	a, b := filepath.Join(dir, "a.img"), filepath.Join(dir, "b.img")
	group := []string{"restore", "--group", "shop/vm@latest", "a=" + a, "b=" + b}
	says(limited("250000", group...), exitFailure,
		"1 of 2 points of the group are restored; run it again with --overwrite: finished ones are written again, the interrupted one continues")
	refused(t, env, exitRefused, "; nothing was written by this run", group...)
	mustRun(t, env, append(group, "--overwrite")...)
	holds(a, "root")
	holds(b, "data")

	diskfstest.NeedTool(t, "qemu-nbd")
	image := filepath.Join(t.TempDir(), "vm.qcow2")
	says(limited("300000", "restore", "shop/vm-b@latest", image, "--format", "qcow2"), exitFailure, "no image was made")
	if left, err := os.ReadDir(filepath.Dir(image)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestWhatARestoreToNBDLeaves: an export is written from its beginning by the next run.
func TestWhatARestoreToNBDLeaves(t *testing.T) {
	t.Parallel()
	env, dir, _ := newGroupEnv(t)
	mustRun(t, env, "backup", "a="+filepath.Join(dir, "root.img"), "b="+filepath.Join(dir, "data.img"), "--volume", "shop/vm")
	uri, _ := startNBD(t, "nbdkit", "-f", "--filter=error", "memory", "1M", "error-pwrite=EIO", "error-pwrite-rate=100%")
	for again, args := range map[string][]string{
		"run it again with --overwrite: it starts from the beginning": nil,
		"a second run starts from the beginning":                      {"--overwrite"},
	} {
		r := runVarve(t, env, append([]string{"restore", "shop/vm-b@latest", uri}, args...)...)
		if r.code != exitFailure || !strings.HasSuffix(r.stderr, "; the target is incomplete; "+again+"\n") {
			t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
	}

	log := filepath.Join(dir, "log")
	uri, _ = startNBD(t, "nbdkit", "-f", "--filter=log", "--filter=delay", "memory", "1M", "logfile="+log, "delay-write=300")
	cmd, _, stderr := varveProcess(t, env, "restore", "--group", "shop/vm@latest", "a="+filepath.Join(dir, "a.img"), "b="+uri)
	waitUntil(t, "the second point is written", func() bool {
		text, err := os.ReadFile(log)
		return err == nil && bytes.Contains(text, []byte(" Write id="))
	})
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	const want = "interrupted; 1 of 2 points of the group are restored; run it again with --overwrite: finished ones are written again\n"
	if code := cmd.ProcessState.ExitCode(); code != exitInterrupted || !strings.HasSuffix(stderr.String(), want) || strings.Count(stderr.String(), "1 of 2") != 1 {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// TestWhatAnArchiveLeaves: half an archive is to be discarded; one that lacks what cannot be
// read is not.
func TestWhatAnArchiveLeaves(t *testing.T) {
	t.Parallel()
	env := newFilesEnv(t)
	for name, c := range map[string]struct {
		to   func(func()) writerFunc
		code int
	}{"interrupted": {interrupted, exitInterrupted}, "full": {toFull, exitFailure}} {
		r := runTo(t, env, c.to, "cp", "--tar", "shop/db@latest:/")
		if r.code != c.code || !strings.HasSuffix(r.stderr, "; the archive is incomplete: discard it\n") {
			t.Errorf("%s: exit code %d: %s", name, r.code, r.stderr)
		}
	}
	if r := runVarve(t, newDamagedEnv(t), "cp", "--tar", "shop/db@latest:/"); r.code == exitOK || strings.Contains(r.stderr, "discard") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
}

// TestCpRefusesTwoOfOneName: nothing is copied then.
func TestCpRefusesTwoOfOneName(t *testing.T) {
	t.Parallel()
	env := newFilesEnv(t)
	dir := t.TempDir()
	refused(t, env, exitUsage, "nothing was copied", "cp", "shop/db@latest:/data", "shop/db@latest:/etc/other", "shop/db@latest:/etc/oth*", dir)
	if !isEmpty(dir) {
		t.Error("files were copied")
	}
	// An argument that names nothing ends the copy, and does not undo it.
	refused(t, env, exitFailure, "does not exist", "cp", "shop/db@latest:/data", "shop/db@latest:/none*", dir)
	if _, err := os.Stat(filepath.Join(dir, "data")); err != nil {
		t.Error(err)
	}
}

// TestHangup: a terminal that is closed ends a command cleanly, however often it is reported,
// and with a SIGTERM beside it; under nohup it ends nothing.
func TestHangup(t *testing.T) {
	t.Parallel()
	// Children inherit that a signal is ignored, as under nohup, but not that it is caught.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(caught) })
	env, _ := newBackupEnv(t)
	fifo := filepath.Join(env["HOME"], "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	start := func(before string) (cmd *exec.Cmd, stderr *bytes.Buffer) {
		t.Helper()
		stderr = &bytes.Buffer{}
		cmd = exec.CommandContext(t.Context(), "/bin/sh", "-c", before+`exec "$0" backup --exec --volume shop/db -- sh -c "echo begun; read line <'$1'; echo \$line"`, self, fifo)
		cmd.Env = append(env.list(), "VARVE_TEST_AS_MAIN=1", "PATH="+os.Getenv("PATH"))
		cmd.Stderr, cmd.WaitDelay = stderr, patience // which the command's command has open as well
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, stderr
	}
	// opened waits until the command of the backup reads.
	opened := func() (w *os.File) {
		t.Helper()
		waitUntil(t, "the command reads", func() bool {
			w, err = os.OpenFile(fifo, os.O_WRONLY|unix.O_NONBLOCK, 0)
			return err == nil
		})
		return w
	}
	for _, signals := range [][]os.Signal{{syscall.SIGHUP}, {syscall.SIGHUP, syscall.SIGHUP}, {syscall.SIGHUP, syscall.SIGTERM}, {syscall.SIGTERM, syscall.SIGHUP}} {
		cmd, stderr := start("")
		w := opened()
		for _, s := range signals {
			if err := cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
		}
		_ = cmd.Wait()
		_ = w.Close()
		if code := cmd.ProcessState.ExitCode(); code != exitInterrupted || !strings.Contains(stderr.String(), "interrupted; ") || !strings.Contains(stderr.String(), "; older recovery points are unchanged") {
			t.Errorf("%v: exit code %d: %s", signals, code, stderr)
		}
	}
	cmd, stderr := start("trap '' HUP; ")
	w := opened()
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("ended\n"); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("under nohup: %v: %s", err, stderr)
	}
	if got := mustRun(t, env, "restore", "shop/db@latest", "-").stdout; got != "begun\nended\n" {
		t.Errorf("the point holds %q", got)
	}
}

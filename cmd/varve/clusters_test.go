package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/progress"
)

// newClustersEnv is a repository with two points of alpha's os/root and one of its
// os/both; the user is on beta, which has a point of os/both.
func newClustersEnv(t *testing.T) (beta testEnv, alphas []string) {
	t.Helper()
	env, disk := newBackupEnv(t)
	env["VARVE_CLUSTER"] = "alpha"
	for range 2 {
		alphas = append(alphas, backupJSON(t, env, disk, "--volume", "os/root").ID)
	}
	backupJSON(t, env, disk, "--volume", "os/both")
	env["VARVE_CLUSTER"] = "beta"
	backupJSON(t, env, disk, "--volume", "os/both")
	return env, alphas
}

func countPoints(t *testing.T, env testEnv) int {
	t.Helper()
	return len(fromJSON[[]pointView](t, mustRun(t, env, "list", "-o", "json").stdout))
}

// Reading commands accept another cluster's point and name its cluster.
func TestReadingAnotherClustersPoint(t *testing.T) {
	env, alphas := newClustersEnv(t)
	dir := env["HOME"]
	for i, args := range [][]string{
		{"show", "os/root@latest"},
		{"show", alphas[0][:8]},
		{"diff", "os/root@latest~1", "os/root@latest"},
		{"verify", "os/root@latest"},
		{"verify", "--volume", "os/root"},
		{"restore", "os/root@latest", filepath.Join(dir, "restored-%d")},
		{"ls", "os/root@latest:/"},
		{"cat", "os/root@latest:/etc/fstab"},
		{"find", "os/root@latest"},
		{"cp", "os/root@latest:/etc", filepath.Join(dir, "copied-%d")},
		{"ls", "--versions", "os/root:/etc/fstab"},
	} {
		for n, prefix := range []string{"", "alpha:"} {
			spelled := make([]string, len(args))
			for j, a := range args {
				spelled[j] = strings.Replace(a, "%d", fmt.Sprint(i, n), 1)
				if prefix != "" && (strings.HasPrefix(a, "os/") || a == alphas[0][:8]) {
					spelled[j] = prefix + a
				}
			}
			r := runVarve(t, env, spelled...)
			// The disk has no files on it, so the commands for files fail later.
			if r.code == exitNotFound || r.code == exitUsage || r.code == exitRefused {
				t.Errorf("%v: exit code %d: %s", spelled, r.code, r.stderr)
			}
			if says := strings.Contains(r.stderr, "used=alpha:os/root"); says != (prefix == "") {
				t.Errorf("%v: whose point it is is said: %v\n%s", spelled, says, r.stderr)
			}
		}
	}
	if out := mustRun(t, env, "show", "os/both@latest", "-o", "json").stdout; fromJSON[showResult](t, out).Cluster != "beta" {
		t.Errorf("a name that both clusters have is not this one's: %s", out)
	}
	empty := runVarve(t, env, "list", "os/root")
	if empty.code != exitNotFound || !strings.Contains(empty.stderr, "alpha:os/root") || strings.Contains(empty.stderr, alphas[0][:8]) {
		t.Errorf("an empty list does not say where the name exists: exit %d:\n%s", empty.code, empty.stderr)
	}
	out := mustRun(t, env, "list").stdout
	if strings.Count(out, "alpha:os/root@") != 2 || !strings.Contains(out, "\nos/both@") {
		t.Errorf("listed:\n%s", out)
	}
}

// Commands that change or delete points require the cluster in the name.
func TestChangingAnotherClustersPoint(t *testing.T) {
	env, alphas := newClustersEnv(t)
	for _, args := range [][]string{
		{"forget", "os/root@latest"},
		{"forget", "os/both@latest", "os/root@latest"}, // all or none
		{"forget", alphas[0]},
		{"forget", "--force", "os/root@latest"},
		{"pin", "os/root@latest"},
		{"unpin", "os/root@latest"},
		{"unpin", "--all", "os/root@latest"},
		{"prune", "--volume", "os/root", "--keep-latest", "1"},
	} {
		r := runVarve(t, env, args...)
		if r.code != exitNotFound || !strings.Contains(r.stderr, "alpha:") {
			t.Errorf("%v: exit code %d: %s", args, r.code, r.stderr)
		}
	}
	if n := countPoints(t, env); n != 4 {
		t.Fatalf("%d points are left of 4", n)
	}
	mustRun(t, env, "pin", "alpha:os/root@latest", "audit")
	mustRun(t, env, "unpin", "--all", "alpha:"+alphas[1])
	if out := mustRun(t, env, "forget", "--dry-run", "alpha:os/root@latest", "alpha:"+alphas[0]).stdout; strings.Count(out, "would delete alpha:os/root@") != 2 {
		t.Errorf("dry run:\n%s", out)
	}
	if n := countPoints(t, env); n != 4 {
		t.Fatalf("a dry run left %d points of 4", n)
	}
	mustRun(t, env, "prune", "--volume", "alpha:os/root", "--keep-latest", "1")
	mustRun(t, env, "forget", "alpha:os/root@latest", "os/both@latest")
	left := fromJSON[[]pointView](t, mustRun(t, env, "list", "-o", "json").stdout)
	if len(left) != 1 || left[0].Cluster != "alpha" || left[0].Volume != "both" {
		t.Errorf("left %+v", left)
	}
}

// openTerminal makes a pseudo-terminal: the person's side, and the program's.
func openTerminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("this machine gives no pseudo-terminal: %v", err)
	}
	t.Cleanup(func() { _ = person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = program.Close() })
	return person, program
}

// On a terminal forget asks, and only yes deletes.
func TestForgetAsks(t *testing.T) {
	env, names := newChainEnv(t, 3)
	for _, tc := range []struct {
		answer string
		args   []string
		code   int
		left   int
	}{
		{"n\n", nil, exitRefused, 3},
		{"\n", nil, exitRefused, 3},
		{"yesterday\n", nil, exitRefused, 3},
		{"", []string{"--dry-run"}, exitOK, 3},
		{"y\n", nil, exitOK, 2},
		{"", []string{"--yes"}, exitOK, 1},
	} {
		person, program := openTerminal(t)
		if _, err := person.WriteString(tc.answer); err != nil {
			t.Fatal(err)
		}
		var stdout, stderr bytes.Buffer
		a := &app{
			stdin: program, stdout: &stdout, stderr: &stderr, log: slog.New(slog.DiscardHandler), progress: progress.New(progress.Options{}),
			lookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
		}
		code := a.run(t.Context(), append([]string{"forget", "shop/db@latest"}, tc.args...))
		if n := countPoints(t, env); code != tc.code || n != tc.left {
			t.Errorf("answer %q, %v: exit code %d, %d points left, want %d and %d\n%s", tc.answer, tc.args, code, n, tc.code, tc.left, stderr.String())
		}
		if tc.answer == "n\n" && !strings.Contains(stderr.String(), names[2]) {
			t.Errorf("the question does not name the point:\n%s", stderr.String())
		}
	}
}

package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/progress"
)

// result is the result of one run of varve.
type result struct {
	code           int
	stdout, stderr string
}

// testEnv is the environment of a test user: a separate home and password, and nothing of the
// machine's.
type testEnv map[string]string

func newTestEnv(t *testing.T) testEnv {
	t.Helper()
	home := t.TempDir()
	// Background processes write to the repository until they end, some time after their
	// mount is gone.
	t.Cleanup(func() {
		waitUntil(t, "the processes of this test end", func() bool { return len(processesOf(home)) == 0 })
	})
	return testEnv{
		"HOME":           home,
		"VARVE_CONFIG":   filepath.Join(home, "repository.config"),
		"VARVE_PASSWORD": "correct horse",
	}
}

// processesOf lists the running processes with this home.
func processesOf(home string) (list []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/environ") // the pattern is well-formed
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err == nil && slices.Contains(strings.Split(string(b), "\x00"), "HOME="+home) {
			list = append(list, filepath.Base(filepath.Dir(name)))
		}
	}
	return list
}

// output is what varve and the commands that it starts print, side by side.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// runVarve runs one command line in this process, as main does.
func runVarve(t *testing.T, env testEnv, args ...string) result {
	t.Helper()
	return runVarveContext(t, t.Context(), env, args...)
}

func runVarveContext(t *testing.T, ctx context.Context, env testEnv, args ...string) result {
	t.Helper()
	var stdout bytes.Buffer
	var stderr output
	a := &app{
		stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr,
		lookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
		log:       slog.New(slog.DiscardHandler),
		progress:  progress.New(progress.Options{}),
	}
	code := a.run(ctx, args)
	return result{code, stdout.String(), stderr.String()}
}

// mustRun is runVarve for a run that must succeed.
func mustRun(t *testing.T, env testEnv, args ...string) result {
	t.Helper()
	r := runVarve(t, env, args...)
	if r.code != exitOK {
		t.Fatalf("varve %s: exit code %d\n%s", strings.Join(args, " "), r.code, r.stderr)
	}
	return r
}

// openRepo opens the repository of an environment. The caller closes it.
func openRepo(t *testing.T, env testEnv) *repository.Repository {
	t.Helper()
	r, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: env["VARVE_CONFIG"], Password: env["VARVE_PASSWORD"]})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

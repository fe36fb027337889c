package main

import (
	"bytes"
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/internal/progress"
)

// result is what one run of varve left behind.
type result struct {
	code           int
	stdout, stderr string
}

// testEnv is the environment of a user under test: a home and a password of
// its own, and nothing of the machine's.
type testEnv map[string]string

func newTestEnv(t *testing.T) testEnv {
	t.Helper()
	home := t.TempDir()
	return testEnv{
		"HOME":           home,
		"VARVE_CONFIG":   filepath.Join(home, "repository.config"),
		"VARVE_PASSWORD": "correct horse",
	}
}

// runVarve runs one command line inside this process, the way main does.
func runVarve(t *testing.T, env testEnv, args ...string) result {
	t.Helper()
	return runVarveContext(t, t.Context(), env, args...)
}

func runVarveContext(t *testing.T, ctx context.Context, env testEnv, args ...string) result { //nolint:revive // t first, as everywhere in tests
	t.Helper()
	var stdout, stderr bytes.Buffer
	a := &app{
		stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr,
		lookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
		log:       slog.New(slog.DiscardHandler),
		progress:  progress.New(progress.Options{}),
	}
	code := a.run(ctx, args)
	return result{code, stdout.String(), stderr.String()}
}

// mustRun is runVarve for a run that has to succeed.
func mustRun(t *testing.T, env testEnv, args ...string) result {
	t.Helper()
	r := runVarve(t, env, args...)
	if r.code != exitOK {
		t.Fatalf("varve %s: exit code %d\n%s", strings.Join(args, " "), r.code, r.stderr)
	}
	return r
}

package main

import (
	"strings"
	"testing"
)

func TestUsageErrorsHaveTheirExitCode(t *testing.T) {
	for _, args := range [][]string{
		{"nosuchcommand"},
		{"repo", "nosuchcommand"},
		{"repo", "create", "floppy"},
		{"maintenance", "nosuchcommand"},
		{"nbd", "nosuchcommand"},
		{"completion", "nosuchshell"},
		{"version", "--nosuchflag"},
		{"version", "extra"},
		{"version", "-o", "xml"},
		{"version", "--log-level", "loud"},
		{"version", "--log-format", "xml"},
		{"version", "--from-file", "/nonexistent"},
	} {
		r := runVarve(t, newTestEnv(t), args...)
		if r.code != exitUsage {
			t.Errorf("varve %s: exit code %d, want %d; stderr %q", strings.Join(args, " "), r.code, exitUsage, r.stderr)
		}
		if !strings.HasPrefix(r.stderr, "varve: ") || r.stdout != "" {
			t.Errorf("varve %s: stderr %q, stdout %q", strings.Join(args, " "), r.stderr, r.stdout)
		}
	}
}

// TestGroupsOfCommandsShowTheirHelp calls commands that only have subcommands.
func TestGroupsOfCommandsShowTheirHelp(t *testing.T) {
	if r := mustRun(t, newTestEnv(t), "repo", "--help"); !strings.Contains(r.stdout, "change-password") {
		t.Errorf("help of repo: %q", r.stdout)
	}
	if r := mustRun(t, newTestEnv(t), "completion", "bash"); !strings.Contains(r.stdout, "__start_varve") {
		t.Errorf("completion: %.100q", r.stdout)
	}
}

func TestVersion(t *testing.T) {
	env := newTestEnv(t)
	if r := mustRun(t, env, "version"); !strings.Contains(r.stdout, "kopia") {
		t.Errorf("table: %q", r.stdout)
	}
	env["VARVE_OUTPUT"] = "json"
	if r := mustRun(t, env, "version"); !strings.Contains(r.stdout, `"platform": "`) {
		t.Errorf("JSON chosen by environment: %q", r.stdout)
	}
}

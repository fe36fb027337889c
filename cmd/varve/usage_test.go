package main

import (
	"strings"
	"testing"
)

// TestUsageErrors: errors are in Varve's own words, on one line, with a suggestion.
func TestUsageErrors(t *testing.T) {
	env := newTestEnv(t)
	for args, want := range map[string]string{
		"restor":                     "unknown command \"restor\" for \"varve\"; did you mean 'varve restore'?",
		"repo creat":                 "unknown command \"creat\" for \"varve repo\"; did you mean 'varve repo create'?",
		"xyzzy":                      "unknown command \"xyzzy\" for \"varve\"\n",
		"repo":                       "\"varve repo\" needs one of: change-password, connect, create, disconnect,",
		"nbd":                        "\"varve nbd\" needs one of: info, list, map, read",
		"maintenance":                "\"varve maintenance\" needs one of: run, status",
		"list --volum a/b":           "unknown flag --volum; did you mean --volume?",
		"list --nothing-of-the-kind": "unknown flag --nothing-of-the-kind\n",
		"backup":                     "name the disk to back up: a block device or an image file",
		"backup -":                   "name the volume of the disk: --volume NAMESPACE/NAME",
		"backup a.img":               "name the volume of the disk: --volume NAMESPACE/NAME",
		"restore":                    "\"varve restore\" needs POINT TARGET",
		"restore shop/db@latest":     "\"varve restore\" takes POINT TARGET..., and got 1 argument",
		"version 1":                  "\"varve version\" takes no arguments, and got \"1\"",
		"pin ":                       "argument 1 is empty",
	} {
		r := runVarve(t, env, strings.Split(args, " ")...)
		first, _, _ := strings.Cut(strings.TrimPrefix(r.stderr, "varve: "), "\n")
		if r.code != exitUsage || !strings.HasPrefix(first+"\n", want) && !strings.HasPrefix(first, want) {
			t.Errorf("varve %s: exit %d: %s\nwant exit %d: %s", args, r.code, first, exitUsage, want)
		}
	}
	if r := mustRun(t, env, "--version"); !strings.HasPrefix(r.stdout, "varve ") || strings.Count(r.stdout, "\n") != 1 {
		t.Errorf("varve --version prints %q", r.stdout)
	}
}

func TestEditDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "abc", 0}, {"", "abc", 3}, {"abc", "", 3}, {"volum", "volume", 1}, {"kitten", "sitting", 3}} {
		if got := editDistance(c.a, c.b); got != c.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

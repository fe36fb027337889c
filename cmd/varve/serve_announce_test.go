package main

import (
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/points"
)

// libnbd's brackets pass a socket, and a command in them must not serve anything else.
func TestServeExamples(t *testing.T) {
	for line := range strings.Lines(newServeCommand(&app{}).Example) {
		_, inner, ok := strings.Cut(line, "[ varve serve ")
		if inner, _, closed := strings.Cut(inner, " ]"); ok && (!closed || strings.Contains(inner, "--stdio") || strings.Contains(inner, "--listen")) {
			t.Errorf("socket activation with %q", inner)
		}
	}
}

func TestShellWord(t *testing.T) {
	for in, want := range map[string]string{"a/b@c": "a/b@c", "": "''", "a?b": "'a?b'", "it's": `'it'\''s'`} {
		if got := shellWord(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func TestExampleName(t *testing.T) {
	if got := exampleName(nil, nil); !strings.Contains(got, "@latest") {
		t.Errorf("of nothing: %s", got)
	}
	if got := exampleName([]string{"shop/db@T"}, []*points.Point{{}}); got != "shop/db@T" {
		t.Errorf("of one: %s", got)
	}
}

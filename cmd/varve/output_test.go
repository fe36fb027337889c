package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/pkg/errors"

	"github.com/varve-io/varve/internal/plain"
)

func TestErrorsAreLoggedInOneLine(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: errorText}))
	log.Warn("it failed", "error", errors.Wrap(errors.New("deep down"), "higher up"))
	if s := out.String(); strings.Count(s, "\n") != 1 || strings.Contains(s, ".go:") || !strings.Contains(s, "higher up: deep down") {
		t.Errorf("logged %q", s)
	}
}

// TestNamesThatTurnTheLine: a name can make a terminal show the rest of the line from right to left,
// so that one name looks like another.
func TestNamesThatTurnTheLine(t *testing.T) {
	for _, c := range "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" {
		name := "invoice" + string(c) + "fdp.exe"
		if got := quoted(name); !strings.HasPrefix(got, `"invoice\u`) || strings.ContainsRune(got, c) {
			t.Errorf("%U: %s", c, got)
		}
		if got := plain.Text(name); strings.ContainsRune(got, c) {
			t.Errorf("%U is printed", c)
		}
	}
	for _, name := range []string{"plain", "שלום", "مرحبا", "naïve.txt"} {
		if quoted(name) != name {
			t.Errorf("%s is quoted: %s", name, quoted(name))
		}
	}
}

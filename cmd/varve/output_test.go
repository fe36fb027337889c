package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/pkg/errors"
)

func TestErrorsAreLoggedInOneLine(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: errorText}))
	log.Warn("it failed", "error", errors.Wrap(errors.New("deep down"), "higher up"))
	if s := out.String(); strings.Count(s, "\n") != 1 || strings.Contains(s, ".go:") || !strings.Contains(s, "higher up: deep down") {
		t.Errorf("logged %q", s)
	}
}

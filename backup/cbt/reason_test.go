package cbt

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestReasonsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/cbt-csi.md")
	if err != nil {
		t.Fatal(err)
	}

	for _, r := range Reasons {
		if !strings.Contains(string(text), "`"+string(r)+"`") {
			t.Errorf("docs/cbt-csi.md does not explain %s", r)
		}
	}
}

func TestFallbackReason(t *testing.T) {
	stop := &Error{Source: "x", Kind: ErrDenied}
	down := &Error{Source: "x", Kind: ErrTruncated, Reason: ReasonStalled, Cause: errors.New("why")}

	for _, c := range []struct {
		err    error
		reason Reason
		ok     bool
	}{
		{nil, "", false},
		{errors.New("x"), "", false},
		{ErrUnavailable, "", false},
		{stop, "", false},
		{down, ReasonStalled, true},
		{fmt.Errorf("list: %w", down), ReasonStalled, true},
	} {
		if reason, ok := FallbackReason(c.err); reason != c.reason || ok != c.ok {
			t.Errorf("%v: %q, %v", c.err, reason, ok)
		}

		if errors.Is(c.err, ErrUnavailable) != c.ok && c.err != ErrUnavailable {
			t.Errorf("%v: ErrUnavailable is in its chain, or not, against its reason", c.err)
		}
	}

	if !errors.Is(down, ErrTruncated) || !errors.Is(down, down.Cause) {
		t.Error("the kind or the cause is not in the chain")
	}
}

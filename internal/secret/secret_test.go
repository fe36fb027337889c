package secret

import (
	"errors"
	"strings"
	"testing"
)

func TestLine(t *testing.T) {
	for in, want := range map[string]string{
		"abc":             "abc",
		"abc\n":           "abc",
		"abc\r\n":         "abc",
		"abc\r":           "abc",
		"\xef\xbb\xbfabc": "abc",
		" a b ":           " a b ",
		"pässwörd\n":      "pässwörd",
		"\xff\x00"[:1]:    "\xff", // any bytes
	} {
		if got, err := Line([]byte(in)); got != want || err != nil {
			t.Errorf("Line(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"", "\n", "\r\n", "\xef\xbb\xbf", "\xef\xbb\xbf\n"} {
		if _, err := Line([]byte(in)); !errors.Is(err, ErrEmpty) {
			t.Errorf("Line(%q): %v, want %v", in, err, ErrEmpty)
		}
	}
	for _, in := range []string{"a\nb", "a\n\n", "\na", "a\rb", "a\x00b", "\xff\xfea\x00", strings.Repeat("a", Max+1)} {
		if got, err := Line([]byte(in)); err == nil {
			t.Errorf("Line(%.20q) = %.20q without an error", in, got)
		}
	}
}

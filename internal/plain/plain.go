// Package plain makes foreign text (of a repository, a disk image, a driver) safe where it is
// shown: on a terminal, in a log, in an event or in a metric. It imports nothing of Varve;
// every layer may use it.
package plain

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Text returns s with U+FFFD in place of each control character, line end, bidirectional
// control and invalid byte. Everything else stays, joiners of scripts and emoji included.
func Text(s string) string {
	return strings.Map(func(r rune) rune {
		if harmful(r) {
			return utf8.RuneError
		}
		return r
	}, s)
}

// Is reports whether Text returns s unchanged.
func Is(s string) bool { return utf8.ValidString(s) && !strings.ContainsFunc(s, harmful) }

func harmful(r rune) bool {
	return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || unicode.Is(unicode.Bidi_Control, r)
}

// Line returns a text of several lines, such as an error may have, as one plain line.
func Line(s string) string {
	return Text(strings.ReplaceAll(strings.TrimSpace(s), "\n", "; "))
}

// Clip returns Text of s, cut to at most n bytes (n is at least 3) between characters; a
// text that was cut ends in "...".
func Clip(s string, n int) string {
	s = Text(s)
	if len(s) <= n {
		return s
	}
	cut := n - 3
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "..."
}

// maxToken bounds a token, in bytes.
const maxToken = 64

// Token reports whether s is a short code: letters, digits, '-', '_', '.' and ':', at most
// 64 of them. An empty one is none.
func Token(s string) bool {
	return s != "" && len(s) <= maxToken && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("-_.:", r)
	})
}

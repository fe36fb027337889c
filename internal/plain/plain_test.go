package plain

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"":                              "",
		"disk-1 of großer Speicher 👩‍🚀": "disk-1 of großer Speicher 👩‍🚀",
		"\x1b[2Jgone":                   "\ufffd[2Jgone",
		"a\nb\tc\x7f\u0085":             "a\ufffdb\ufffdc\ufffd\ufffd",
		"exe\u202efdp.txt":              "exe\ufffdfdp.txt",
		"line\u2028sep":                 "line\ufffdsep",
		"bad\xff":                       "bad\ufffd",
	} {
		if got := Text(in); got != want {
			t.Errorf("Text(%q) = %q, want %q", in, got, want)
		}
		if Is(in) != (in == want) {
			t.Errorf("Is(%q) = %v", in, Is(in))
		}
	}
	if got := Line(" first\nsecond\n"); got != "first; second" {
		t.Errorf("Line: %q", got)
	}
}

func FuzzClip(f *testing.F) {
	f.Add("häßlich\n", 5)
	f.Fuzz(func(t *testing.T, s string, n int) {
		n = 3 + (n&0xff+0x100)&0xff
		got := Clip(s, n)
		if len(got) > n || !utf8.ValidString(got) || !Is(got) {
			t.Fatalf("Clip(%q, %d) = %q", s, n, got)
		}
		if again := Clip(got, n); again != got {
			t.Fatalf("Clip is not stable: %q, %q", got, again)
		}
	})
}

func TestToken(t *testing.T) {
	for s, want := range map[string]bool{
		"csi-delta": true, "NoService": true, "": false, "a b": false, "a\n": false, "x{y=\"z\"}": false,
		strings.Repeat("a", 64): true, strings.Repeat("a", 65): false, "ä": false,
	} {
		if Token(s) != want {
			t.Errorf("Token(%q) = %v", s, !want)
		}
	}
}

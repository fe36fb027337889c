package store

import (
	"errors"
	"strings"
	"testing"
)

func TestCredentialsAreOneLine(t *testing.T) {
	for text, want := range map[string]string{"abc": "abc", "abc\n": "abc", "abc\r\n": "abc", "\xef\xbb\xbfabc\n": "abc"} {
		c := Credentials{KeyPassword: []byte(text)}
		if err := c.Check(); err != nil || c.Password() != want {
			t.Errorf("%q: %q, %v; want %q", text, c.Password(), err, want)
		}
	}
	err := Credentials{KeyPassword: []byte("first\nsecond")}.Check()
	if !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), "key password of the Secret holds more than one line") || strings.Contains(err.Error(), "first") {
		t.Errorf("two lines: %v", err)
	}
	if err := (Credentials{keyPrivateKey: []byte("a\nb\n"), "notes": []byte("a\nb")}).Check(); err != nil {
		t.Errorf("files and other keys: %v", err)
	}
}

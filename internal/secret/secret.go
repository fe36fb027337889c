// Package secret defines the value of a secret in every form that varve accepts: a file, a
// variable, a command's output, a setting, a terminal, a key of a Kubernetes Secret. The same
// bytes mean the same secret in each.
package secret

import (
	"bytes"
	"errors"
	"fmt"
)

// Max bounds a secret, in bytes.
const Max = 64 << 10

// ErrEmpty means that nothing is left of a secret.
var ErrEmpty = errors.New("is empty")

// Line returns the secret in p: its one line. One line end at its end (\n, \r\n or \r) and a
// byte order mark of UTF-8 at its start, which editors and shells add, are not part of it.
// The errors follow the name of where p comes from ("is empty") and never show p.
func Line(p []byte) (string, error) {
	if len(p) > Max {
		return "", fmt.Errorf("is longer than %d bytes", Max)
	}
	if bytes.HasPrefix(p, []byte("\xff\xfe")) || bytes.HasPrefix(p, []byte("\xfe\xff")) {
		return "", errors.New("is text in UTF-16; write it in UTF-8")
	}
	p = bytes.TrimPrefix(p, []byte("\xef\xbb\xbf"))
	p = bytes.TrimSuffix(bytes.TrimSuffix(p, []byte("\n")), []byte("\r"))
	switch {
	case len(p) == 0:
		return "", ErrEmpty
	case bytes.ContainsAny(p, "\n\r"):
		return "", errors.New("holds more than one line")
	case bytes.IndexByte(p, 0) >= 0:
		return "", errors.New("holds a NUL byte")
	}
	return string(p), nil
}

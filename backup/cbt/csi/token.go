package csi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
)

// Token is a bearer token that does not show itself: printed, logged or marshalled, it
// is "[token]". The zero value is no token.
type Token struct {
	// A pointer, for package fmt asks no method of a struct's unexported field.
	secret *string
}

const redacted = "[token]"

// maxToken bounds a token, in bytes.
const maxToken = 64 << 10

// NewToken makes a token of its text, without the space around it.
func NewToken(secret string) (Token, error) {
	secret = strings.TrimSpace(secret)

	switch {
	case secret == "":
		return Token{}, errors.New("the token is empty")
	case len(secret) > maxToken:
		return Token{}, fmt.Errorf("the token has more than %d bytes", maxToken)
	case strings.ContainsFunc(secret, func(r rune) bool { return r <= ' ' || r > '~' }):
		return Token{}, errors.New("the token has characters that no token has; is this the right file?")
	}

	return Token{&secret}, nil
}

// Equal says whether two tokens are the same.
func (t Token) Equal(u Token) bool { return t.text() == u.text() }

// text is what the service is sent.
func (t Token) text() string {
	if t.secret == nil {
		return ""
	}

	return *t.secret
}

// Format, MarshalText and LogValue keep the token from showing: %v, %+v, %#v, %s, %q,
// %x, JSON and slog.

// Format implements fmt.Formatter.
func (Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText implements encoding.TextMarshaler.
func (Token) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue implements slog.LogValuer.
func (Token) LogValue() slog.Value { return slog.StringValue(redacted) }

// redact takes the token, and each long part of it, out of what a service said.
func (t Token) redact(text string) string {
	const long = 16

	secret := t.text()
	if secret == "" {
		return text
	}

	text = strings.ReplaceAll(text, secret, redacted)
	for part := range strings.SplitSeq(secret, ".") {
		if len(part) >= long {
			text = strings.ReplaceAll(text, part, redacted)
		}
	}

	return text
}

// TokenSource gives a token that is good for a call made now. It is asked before each
// call, and a service may take long to be through: what it gives should live for a
// minute at least. Errors end the backup once they outlast the retries. Safe for
// concurrent use.
type TokenSource interface {
	Token(ctx context.Context) (Token, error)
}

// Refresher is a TokenSource that keeps tokens and can be told that one was refused.
type Refresher interface {
	TokenSource
	// Refused drops the token, if it is still the one kept.
	Refused(Token)
}

// TokenFile is a TokenSource: the path of a file that the kubelet keeps fresh, a
// projected service account token. It is read for each call, so that there is none to
// expire here.
type TokenFile string

var _ TokenSource = TokenFile("")

// Token reads the file.
func (f TokenFile) Token(context.Context) (Token, error) {
	file, err := os.Open(string(f))
	if err != nil {
		return Token{}, fmt.Errorf("read token: %w", err)
	}
	defer file.Close()

	text, err := io.ReadAll(io.LimitReader(file, maxToken+1))
	if err != nil {
		return Token{}, fmt.Errorf("read token: %w", err)
	}

	token, err := NewToken(string(text))
	if err != nil {
		return Token{}, fmt.Errorf("read token from %s: %w", string(f), err)
	}

	return token, nil
}

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
	// A pointer, since package fmt calls no method of a struct's unexported field.
	secret *string
}

const redacted = "[token]"

// maxToken bounds a token, in bytes.
const maxToken = 64 << 10

// NewToken makes a token from its text, without surrounding space.
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

// Equal reports whether two tokens are the same.
func (t Token) Equal(u Token) bool { return t.text() == u.text() }

// text returns the token as sent to the service.
func (t Token) text() string {
	if t.secret == nil {
		return ""
	}
	return *t.secret
}

// Format, MarshalText and LogValue hide the token: in %v, %+v, %#v, %s, %q, %x, JSON and
// slog.

// Format implements fmt.Formatter.
func (Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText implements encoding.TextMarshaler.
func (Token) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue implements slog.LogValuer.
func (Token) LogValue() slog.Value { return slog.StringValue(redacted) }

// redact removes the token, and each long part of it, from a service's message.
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

// TokenSource returns a token that is valid for a call made now. It is called before each
// call, and a service may take long, so the token should live for a minute at least. Errors
// end the backup once they outlast the retries. Safe for concurrent use.
type TokenSource interface {
	Token(ctx context.Context) (Token, error)
}

// Refresher is a TokenSource that keeps tokens and is informed of refused ones.
type Refresher interface {
	TokenSource
	// Refused drops the token, if it is still the one kept.
	Refused(Token)
}

// TokenFile is a TokenSource: the path of a file that the kubelet renews, a projected service
// account token. It is read for each call, so that no expired token is kept.
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

package store

import (
	"errors"
	"log/slog"
	"net/url"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/repository"
)

// notSecret are keys whose values are public, and help to find a mistake.
var notSecret = map[string]bool{keyUser: true, keyKnownHosts: true, keyAccessKeyID: true, keyB2KeyID: true}

// shortestSecret is the length from which a value is redacted: a shorter one would match
// innocent text.
const shortestSecret = 6

// secrets returns the texts that no message may contain. A SAS token is part of URLs, which
// network errors quote: there its parts are reordered, and escaped again.
func (c Credentials) secrets() []string {
	var out []string
	for key := range c {
		if !notSecret[key] {
			out = append(out, c.text(key))
		}
	}
	if q, err := url.ParseQuery(strings.TrimPrefix(c.text(keySASToken), "?")); err == nil {
		for _, v := range q["sig"] {
			out = append(out, v, url.QueryEscape(v), url.PathEscape(v))
		}
	}
	return out
}

// Redact removes the credentials from an error: errors go to conditions, events and logs,
// which others may read. What the error wraps stays reachable. It returns the error itself
// if there is nothing to hide.
func (c Credentials) Redact(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	clean := text
	for _, s := range c.secrets() {
		if len(s) >= shortestSecret {
			clean = strings.ReplaceAll(clean, s, "***")
		}
	}
	if clean == text {
		return err
	}
	return &redacted{err: err, text: clean}
}

// withheld replaces a server's answer in errors for tenants. Otherwise the author of a Repository
// could make Varve call any server within its reach, and read the answer.
const withheld = "the storage cannot be reached or does not answer as one: check endpoint, bucket and keys; what it answered is in the log of Varve's pods, for administrators"

// Withhold is Redact for a tenant's store: it removes a server's answer and logs it instead,
// unless log is nil.
func (c Credentials) Withhold(err error, log *slog.Logger) error {
	err = c.Redact(err)
	if err == nil || !errors.Is(err, repository.ErrUnreachable) && !errors.Is(err, repository.ErrStorageFailed) {
		return err
	}
	if log != nil {
		log.Warn("the storage of a Repository does not answer as it should", "error", err)
	}
	return &redacted{err: err, text: withheld}
}

// told reports whether an error of opening a tenant's store contains nothing of a server's
// answer: it is about the tenant's own input, or about what only the tenant's repository can
// hold.
func told(err error) bool {
	return slices.ContainsFunc([]error{
		ErrCredentials, ErrSpec, ErrOtherRepository, ErrReadOnly, repository.ErrReadOnly, repository.ErrInvalidOptions, repository.ErrWrongPassword,
		repository.ErrReplaced, repository.ErrNewerFormat, repository.ErrNotInitialized, repository.ErrIncompleteRepository, repository.ErrAlreadyExists,
		repository.ErrUpgradeInProgress, repository.ErrPasswordChangeInterrupted,
	}, func(is error) bool { return errors.Is(err, is) }) && !errors.Is(err, repository.ErrUnreachable) && !errors.Is(err, repository.ErrStorageFailed)
}

// redacted is an error with another text.
type redacted struct {
	err  error
	text string
}

func (e *redacted) Error() string { return e.text }
func (e *redacted) Unwrap() error { return e.err }

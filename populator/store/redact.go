package store

import (
	"errors"
	"log/slog"
	"net/url"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/repository"
)

// notSecret are keys whose values may be read by anybody, and help to find a mistake.
var notSecret = map[string]bool{keyUser: true, keyKnownHosts: true, keyAccessKeyID: true, keyB2KeyID: true}

// shortestSecret is the length from which a value is looked for: a shorter one would be found
// in innocent text.
const shortestSecret = 6

// secrets are the texts that no message may hold. A SAS token is part of URLs, which errors of
// the network quote: its parts are put in another order there, and escaped anew.
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

// Redact has an error say nothing of the credentials: errors go to conditions, events and
// logs, which others may read. What the error wraps can still be asked for. It returns the
// error itself if there is nothing to hide.
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

// withheld is what a tenant is told in place of a server's answer. Whoever may write a Repository
// could else have Varve look at any server that it reaches, and read what that said.
const withheld = "the storage cannot be reached or does not answer as one: check endpoint, bucket and keys; what it answered is in the log of Varve's pods, for administrators"

// Withhold is Redact for a tenant's store: of what a server answered nothing is told, and it is
// logged instead.
func (c Credentials) Withhold(err error) error {
	err = c.Redact(err)
	if err == nil || !errors.Is(err, repository.ErrUnreachable) && !errors.Is(err, repository.ErrStorageFailed) {
		return err
	}
	slog.Warn("the storage of a Repository does not answer as it should", "error", err)

	return &redacted{err: err, text: withheld}
}

// told reports whether an error of opening a tenant's store says nothing of what a server
// answered: it is about the tenant's own words, or what only a repository of theirs can hold.
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

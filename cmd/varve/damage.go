package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/varve-io/varve/backup/repository"
)

// damageReport names what of files cannot be read, and has a command go on. Its methods
// must not be called at once.
type damageReport struct {
	app    *app
	ctx    context.Context //nolint:containedctx // lives for one command
	failed []error
}

// fail names what cannot be read. Where the storage does not answer, nothing else could be
// read either: the error comes back.
func (r *damageReport) fail(point, name string, err error) error {
	if errors.Is(err, repository.ErrUnreachable) || r.ctx.Err() != nil {
		return err
	}
	r.app.log.Error("cannot read", "file", point+":"+rooted(name), "error", withoutPath(err))
	r.failed = append(r.failed, err)
	return nil
}

// withoutPath is an error without the path that stands before it.
func withoutPath(err error) error {
	if path, ok := err.(*fs.PathError); ok { //nolint:errorlint // one within another error is part of its text
		return path.Err
	}
	return err
}

// err is the error behind output that lacks what was named.
func (r *damageReport) err() error {
	if len(r.failed) == 0 {
		return nil
	}
	return &unreadableError{r.failed}
}

type unreadableError struct{ causes []error }

func (e *unreadableError) Error() string {
	if len(e.causes) == 1 {
		return "one file or directory could not be read in full: it is named above; everything else is complete"
	}
	return fmt.Sprintf("%d files or directories could not be read in full: they are named above; everything else is complete", len(e.causes))
}

// Unwrap gives all causes, for the exit code.
func (e *unreadableError) Unwrap() []error { return e.causes }

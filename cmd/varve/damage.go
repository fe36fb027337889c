package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs/files"
)

// damageReport reports what cannot be read of files, so that a command continues. It is not
// safe for concurrent use.
type damageReport struct {
	app    *app
	ctx    context.Context // of one command
	failed []error
}

// fail reports what cannot be read. If the storage does not answer, it returns the error,
// since nothing else could be read either.
func (r *damageReport) fail(point, name string, err error) error {
	if errors.Is(err, repository.ErrUnreachable) || r.ctx.Err() != nil {
		return err
	}
	r.app.log.Error("cannot read", "file", point+":"+files.Rooted(name), "error", files.WithoutPath(err))
	r.failed = append(r.failed, err)
	return nil
}

// err returns the error of a command whose output lacks what was reported.
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

// Unwrap returns all causes, for the exit code.
func (e *unreadableError) Unwrap() []error { return e.causes }

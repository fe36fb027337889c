package main

import (
	"reflect"
	"slices"
	"strings"
)

// brief is the text of an error without what the layers of libraries below put around its
// cause: of "flush to storage: write manifests: unable to write content chunk 0 of manifests:
// … despite 2 retries: mkdir /r/s: read-only file system" it is "flush to storage: mkdir /r/s:
// read-only file system". The whole chain is for -v.
func brief(err error) string {
	causes := causesOf(err)
	if ofLibrary(err) && len(causes) > 0 {
		return briefAll(causes)
	}
	text := err.Error()
	for _, cause := range causes {
		whole := cause.Error()
		if short := brief(cause); short != whole && whole != "" {
			text = strings.Replace(text, whole, short, 1)
		}
	}
	return text
}

// inFull is the whole chain of an error, on one line that does no harm to a terminal.
func inFull(err error) string {
	return printable(strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; "))
}

// withoutRepeats leaves out a part of a text that only repeats the one before.
func withoutRepeats(text string) string {
	parts := strings.Split(text, ": ")
	return strings.Join(slices.Compact(parts), ": ")
}

// briefAll is the texts of several errors, each once.
func briefAll(errs []error) string {
	var texts []string
	for _, err := range errs {
		text := brief(err)
		seen := false
		for _, t := range texts {
			seen = seen || strings.Contains(t, text)
		}
		if !seen {
			texts = append(texts, text)
		}
	}
	return strings.Join(texts, ": ")
}

func causesOf(err error) []error {
	switch e := err.(type) { //nolint:errorlint // walks the tree itself
	case interface{ Unwrap() error }:
		if cause := e.Unwrap(); cause != nil {
			return []error{cause}
		}
	case interface{ Unwrap() []error }:
		return e.Unwrap()
	case interface{ Cause() error }: // github.com/pkg/errors before Unwrap
		if cause := e.Cause(); cause != nil {
			return []error{cause}
		}
	}
	return nil
}

// ofLibrary tells whether an error only says which of Kopia's functions failed.
func ofLibrary(err error) bool {
	t := reflect.TypeOf(err)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	path := t.PkgPath()
	return path == "github.com/pkg/errors" || strings.HasPrefix(path, "github.com/kopia/")
}

// What stays of the work of a command that ends early, and what running it again does, by the
// command's path. Errors of a command's own say more where they know more.
var interruptedText = map[string]string{
	"varve backup":          "older recovery points are as they were; run it again, and it goes on from the last checkpoint",
	"varve commit":          "the overlay and older recovery points are as they were; run it again",
	"varve restore":         "what was written so far stays on the target, which is incomplete; run the same command again, and it goes on from there",
	"varve verify":          "nothing was changed; run it again",
	"varve prune":           "points that were deleted stay deleted, the others are as they were; run it again",
	"varve forget":          "points that were deleted stay deleted, the others are as they were; run it again",
	"varve maintenance run": "nothing that a recovery point needs was deleted; run it again, it counts as not done",
	"varve cp":              "files that were copied whole stay; run it again",
	"varve nbd read":        "what was read so far stays in the file, which is incomplete; run it again",
}

// whatStays adds to the text of an error what became of the work.
func whatStays(command string, code int, text string) string {
	stays := interruptedText[command]
	switch {
	case stays == "", code != exitInterrupted && (code != exitFailure || command != "varve backup"):
		return text
	}
	return text + "; " + stays
}

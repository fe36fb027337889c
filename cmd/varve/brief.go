package main

import (
	"reflect"
	"slices"
	"strings"

	"github.com/varve-io/varve/internal/plain"
)

// brief returns the text of an error without what layers of libraries add around its cause:
// "flush to storage: mkdir /r/s: read-only file system" of "flush to storage: write
// manifests: unable to write content chunk 0 of manifests: … despite 2 retries: mkdir /r/s:
// read-only file system". -v shows the whole chain.
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

// inFull returns the whole chain of an error, on one line that is safe for a terminal.
func inFull(err error) string {
	return plain.Line(err.Error())
}

// withoutRepeats removes parts of a text that only repeat the part before.
func withoutRepeats(text string) string {
	parts := strings.Split(text, ": ")
	return strings.Join(slices.Compact(parts), ": ")
}

// briefAll returns the texts of several errors, each once.
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

// ofLibrary reports whether an error only names the function of Kopia that failed.
func ofLibrary(err error) bool {
	t := reflect.TypeOf(err)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	path := t.PkgPath()
	return path == "github.com/pkg/errors" || strings.HasPrefix(path, "github.com/kopia/")
}

// interruptedText is what remains of the work of an interrupted command, and what a second
// run does, by the command's path. A command's own errors are more exact.
var interruptedText = map[string]string{
	"varve backup":          "older recovery points are unchanged; run it again to continue from the last checkpoint",
	"varve commit":          "the overlay and older recovery points are unchanged; run it again",
	"varve restore":         "the target is incomplete; run the same command again to continue",
	"varve verify":          "nothing was changed; run it again",
	"varve prune":           "points that were deleted stay deleted, the others are unchanged; run it again",
	"varve forget":          "points that were deleted stay deleted, the others are unchanged; run it again",
	"varve maintenance run": "no data of a recovery point was deleted; maintenance is still due: run it again",
	"varve cp":              "files that were copied whole are kept; run it again",
	"varve nbd read":        "the file is incomplete; run it again",
}

// whatStays adds to an error what remains of the work: for interrupted commands, and for a
// backup that failed after it had begun.
func whatStays(command string, code int, begun bool, text string) string {
	stays := interruptedText[command]
	if stays == "" || code != exitInterrupted && (code != exitFailure || command != "varve backup" || !begun) {
		return text
	}
	return text + "; " + stays
}

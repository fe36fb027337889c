package main

import (
	"cmp"
	"reflect"
	"regexp"
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
// run does, by the command's path or that of a command above it. What a command sets itself
// (app.left) is more exact.
var interruptedText = map[string]string{
	"varve backup":               "older recovery points are unchanged; run it again to continue from the last checkpoint",
	"varve commit":               "the overlay and older recovery points are unchanged; run it again",
	"varve restore":              "nothing was written by this run; run it again",
	"varve verify":               "nothing was changed; run it again",
	"varve prune":                "points that were deleted stay deleted, the others are unchanged; run it again",
	"varve forget":               "points that were deleted stay deleted, the others are unchanged; run it again",
	"varve maintenance run":      "no data of a recovery point was deleted; maintenance is still due: run it again",
	"varve cp":                   "files that were copied whole are kept; run it again with --force",
	"varve nbd read":             "the file is incomplete; run it again with --overwrite",
	"varve repo change-password": "the password may have been changed; run it again with the same two passwords",
	"varve repo create":          "run it again with the same options and password",
	"varve repo repair":          "recovery points are unchanged; run it again",
}

// interruptedOf returns the text of a command; empty if it has none.
func interruptedOf(command string) string {
	for path := command; path != ""; path = path[:max(strings.LastIndexByte(path, ' '), 0)] {
		if text, ok := interruptedText[path]; ok {
			return text
		}
	}
	return ""
}

// workState says which errors of a command leave something of its work behind.
type workState int

const (
	workNotBegun workState = iota // an interrupt; see interruptedText
	workBegun                     // a failure as well
	workDone                      // any error: the work itself succeeded
)

// begin notes that the work begins: an error leaves behind what left says or, if that is
// empty, interruptedText.
func (a *app) begin(left string) { a.work, a.left = workBegun, left }

// done notes that the work succeeded; an error after that does not undo it.
func (a *app) done(left string) { a.work, a.left = workDone, left }

// notBegun notes that an error left everything as it was.
func (a *app) notBegun() { a.work, a.left = workNotBegun, "" }

// saysWhatStays matches errors that say it themselves.
var saysWhatStays = regexp.MustCompile(`recovery point [0-9a-f]{32} (is complete|was written), but|it is incomplete: free some space|the group is incomplete: |the disks are restored to `)

// whatStays adds to an error what remains of the work.
func (a *app) whatStays(command string, code int, text string) string {
	left := cmp.Or(a.left, interruptedOf(command))
	switch {
	case left == "" || strings.Contains(text, left) || saysWhatStays.MatchString(text):
		return text
	case code == exitInterrupted, a.work == workDone:
	case a.work == workBegun && (code == exitFailure || code == exitRepository):
	case a.work == workBegun && code == exitDamaged:
		left, _, _ = strings.Cut(left, "; ") // another run meets the same damage
	default:
		return text
	}
	return text + "; " + left
}

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/plain"
	"github.com/varve-io/varve/internal/progress"
)

// print shows the result of a command: as indented JSON with -o json, else as
// the table that write fills. Give result types stable JSON names: lower camel
// case, sizes in bytes, times in RFC 3339.
func (a *app) print(result any, write func(t *table)) error {
	if a.flags.output == "json" {
		enc := json.NewEncoder(a.stdout)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		if err := enc.Encode(result); err != nil {
			return fmt.Errorf("print result: %w", err)
		}
		return nil
	}
	t := &table{w: tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)}
	write(t)
	if t.err == nil {
		t.err = t.w.Flush()
	}
	if t.err != nil {
		return fmt.Errorf("print result: %w", t.err)
	}
	return nil
}

// jsonList prints the elements of a JSON array one by one, in the same form as print.
type jsonList struct {
	out  *bufio.Writer
	some bool
}

func (a *app) newJSONList() *jsonList { return &jsonList{out: bufio.NewWriter(a.stdout)} }

func (l *jsonList) add(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent("  ", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	before := ",\n  "
	if !l.some {
		before, l.some = "[\n  ", true
	}
	if _, err := l.out.WriteString(before + strings.TrimSuffix(b.String(), "\n")); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	return nil
}

// end closes the array. After an error an empty array is not printed.
func (l *jsonList) end(err error) error {
	switch {
	case l.some:
		_, _ = l.out.WriteString("\n]\n") // Flush reports it
	case err == nil:
		_, _ = l.out.WriteString("[]\n")
	}
	if failed := l.out.Flush(); failed != nil {
		return errors.Join(err, fmt.Errorf("print result: %w", failed))
	}
	return err
}

// tableRows is the maximum number of rows aligned together.
const tableRows = 10_000

// table aligns rows of cells in columns.
type table struct {
	w    *tabwriter.Writer
	err  error
	rows int
}

// row writes one row. Control characters in a cell, which may come from an untrusted
// repository, do not reach the terminal.
func (t *table) row(cells ...any) {
	line := make([]string, len(cells))
	for i, c := range cells {
		line[i] = plain.Text(fmt.Sprint(c))
	}
	t.write(strings.Join(line, "\t"))
	if t.rows++; t.rows%tableRows == 0 && t.err == nil {
		t.err = t.w.Flush() // to bound the memory of a table
	}
}

// line writes text outside the columns.
func (t *table) line(format string, args ...any) {
	t.write(plain.Text(fmt.Sprintf(format, args...)))
}

func (t *table) write(s string) {
	if t.err == nil {
		_, t.err = io.WriteString(t.w, strings.TrimRight(s, " ")+"\n")
	}
}

func (t *table) bytes(n int64) string { return bytesize.Format(n) }

// time formats a time as in names of recovery points: UTC, to the second.
func (t *table) time(at time.Time) string {
	if at.IsZero() {
		return "-"
	}
	return at.UTC().Format("2006-01-02T15:04:05Z")
}

// startOutput sets up logging and progress, both on stderr.
func (a *app) startOutput() error {
	terminal, isTerminal := a.stderr.(*os.File)
	isTerminal = isTerminal && term.IsTerminal(int(terminal.Fd()))

	level := slog.LevelInfo
	if isTerminal {
		level = slog.LevelWarn // the bar shows the rest
	}
	if a.flags.logLevel != "" {
		if err := level.UnmarshalText([]byte(a.flags.logLevel)); err != nil {
			return usagef("--log-level is debug, info, warn or error, not %q", a.flags.logLevel)
		}
	}
	if a.flags.verbose {
		level = slog.LevelDebug
	}
	var newHandler func(io.Writer) slog.Handler
	opt := &slog.HandlerOptions{Level: level, ReplaceAttr: errorText}
	switch a.flags.logFormat {
	case "text":
		newHandler = func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, opt) }
	case "json":
		newHandler = func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, opt) }
	default:
		return usagef("--log-format is text or json, not %q", a.flags.logFormat)
	}

	var show progress.Options
	switch {
	case a.flags.noProgress:
	case isTerminal:
		show.Terminal = a.stderr
		show.Width = func() int {
			w, _, err := term.GetSize(int(terminal.Fd()))
			if err != nil || w < 20 {
				return 80
			}
			return w
		}
	default:
		show.Log = slog.New(newHandler(a.stderr))
	}
	a.progress.Close()
	a.progress = progress.New(show)
	a.log = slog.New(newHandler(a.progress.Writer(a.stderr)))
	slog.SetDefault(a.log) // for libraries that log to the default logger
	return nil
}

// errorText logs an error as one line with its whole chain: Kopia's errors, formatted in
// full, print a stack trace for every frame they passed.
func errorText(_ []string, at slog.Attr) slog.Attr {
	if err, ok := at.Value.Any().(error); ok {
		at.Value = slog.StringValue(inFull(err))
	}
	return at
}

// isClosed reports whether a standard stream was closed when the process started. Go's
// runtime then opens /dev/null (runtime.checkfds) for reading and writing, which a
// redirection to it does not.
func isClosed(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_ACCMODE != unix.O_RDWR {
		return err != nil
	}
	var opened, null unix.Stat_t
	return unix.Fstat(int(f.Fd()), &opened) == nil && unix.Stat(os.DevNull, &null) == nil && opened.Rdev == null.Rdev && opened.Mode == null.Mode
}

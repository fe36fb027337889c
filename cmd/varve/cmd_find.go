package main

import (
	"context"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/files"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/plain"
)

type findFlags struct {
	name, typ, size, newer, older string
	stale, null                   bool
}

func newFindCommand(a *app) *cobra.Command {
	var f findFlags
	cmd := &cobra.Command{
		Use:     "find POINT[:/PATH]...",
		GroupID: groupRead,
		Short:   "Find files of a recovery point",
		Long: `Print the paths of all files below a path that meet every condition given. What
cannot be read is reported, and the search continues.`,
		Example: `  varve find shop/db@latest:/etc --name '*.conf'
  varve find shop/db@latest --type f --size +100M
  varve find shop/db@latest:/home --newer 2026-11-19`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.find(cmd.Context(), args, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.name, "name", "", "last element of the path matches this pattern (*, ?, [])")
	fl.StringVar(&f.typ, "type", "", "kind of file, one or more of: f file, d directory, l link, p pipe, s socket, b block and c character device")
	fl.StringVar(&f.size, "size", "", "size: +10M for more, -10M for less, 10M for just that")
	fl.StringVar(&f.newer, "newer", "", "modified at or after this time: 2026-11-20 or 2026-11-20T10:00:00Z")
	fl.StringVar(&f.older, "older", "", "modified before this time")
	fl.BoolVarP(&f.null, "print0", "0", false, "end paths with a zero byte, not with a line break")
	addStaleFlag(cmd, &f.stale)
	return cmd
}

// conditions returns the predicate of the flags.
func (f findFlags) conditions() (func(*browse.Entry) bool, error) {
	var all []func(*browse.Entry) bool
	if f.name != "" {
		if _, err := path.Match(f.name, ""); err != nil {
			return nil, usagef("--name %q: %w", f.name, err)
		}
		all = append(all, func(e *browse.Entry) bool {
			ok, _ := path.Match(f.name, path.Base(e.Path)) // the pattern was checked before
			return ok
		})
	}
	if strings.Trim(f.typ, "fdlpsbc") != "" {
		return nil, usagef("--type %q: give one or more of f, d, l, p, s, b and c", f.typ)
	}
	if f.typ != "" {
		all = append(all, func(e *browse.Entry) bool { return strings.IndexByte(f.typ, files.TypeLetter(e.Stat.Mode)) >= 0 })
	}
	if f.size != "" {
		n, err := bytesize.Parse(strings.TrimLeft(f.size, "+-"))
		if err != nil {
			return nil, usagef("--size: %w", err)
		}
		all = append(all, func(e *browse.Entry) bool {
			switch f.size[0] {
			case '+':
				return e.Stat.Size > n
			case '-':
				return e.Stat.Size < n
			}
			return e.Stat.Size == n
		})
	}
	for _, c := range []struct {
		flag, text string
		ok         func(e *browse.Entry, t time.Time) bool
	}{
		{"--newer", f.newer, func(e *browse.Entry, t time.Time) bool { return !e.Stat.Mtime.Before(t) }},
		{"--older", f.older, func(e *browse.Entry, t time.Time) bool { return e.Stat.Mtime.Before(t) }},
	} {
		if c.text == "" {
			continue
		}
		t, err := parseMoment(c.text)
		if err != nil {
			return nil, usagef("%s: %w", c.flag, err)
		}
		all = append(all, func(e *browse.Entry) bool { return c.ok(e, t) })
	}
	return func(e *browse.Entry) bool {
		for _, ok := range all {
			if !ok(e) {
				return false
			}
		}
		return true
	}, nil
}

func parseMoment(s string) (time.Time, error) {
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is not a time like 2026-11-20 or 2026-11-20T10:00:00Z (UTC)", s)
}

func (a *app) find(ctx context.Context, args []string, f findFlags) error {
	match, err := f.conditions()
	if err != nil {
		return err
	}
	var list *jsonList
	if a.flags.output == "json" {
		list = a.newJSONList()
	}
	err = a.eachFile(ctx, "find", disks.Late, args, f.stale, func(from *files.Point, fsys diskfs.FileSystem, name string, _ bool, report *damageReport) error {
		return browse.Walk(ctx, fsys, name, func(e *browse.Entry) error {
			if !match(e) {
				return nil
			}
			if list != nil {
				d, err := files.Describe(e)
				if err != nil {
					d.Error = message(err)
					if err := report.fail(from.Name(), e.Path, err); err != nil {
						return err
					}
				}
				d.Name = files.Rooted(e.Path)
				return list.add(d)
			}
			line := files.Rooted(e.Path)
			if f.null {
				line += "\x00"
			} else {
				line = quoted(line) + "\n"
			}
			if _, err := io.WriteString(a.stdout, line); err != nil {
				return fmt.Errorf("print result: %w", err)
			}
			return nil
		}, func(name string, err error) error {
			return report.fail(from.Name(), name, err)
		})
	})
	if list != nil {
		err = list.end(err)
	}
	return err
}

// quoted returns a name for a terminal: quoted if it could do harm there.
func quoted(s string) string {
	if plain.Is(s) {
		return s
	}
	return strconv.Quote(s)
}

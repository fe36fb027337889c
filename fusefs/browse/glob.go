package browse

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// HasGlob reports whether a path has a wildcard.
func HasGlob(name string) bool { return strings.ContainsAny(name, `*?[\`) }

// Glob lists the files that match a pattern, sorted, with the wildcards of path.Match within
// each element. A pattern that is itself a file's name returns just that. fail is called for
// directories that cannot be read completely; if it returns nil the search continues.
func Glob(ctx context.Context, fsys diskfs.FileSystem, pattern string, fail func(name string, err error) error) ([]string, error) {
	if _, err := fsys.Lstat(pattern); err == nil || !HasGlob(pattern) {
		return []string{pattern}, err
	}
	found := []string{"."}
	for elem := range strings.SplitSeq(pattern, "/") {
		var next []string
		for _, dir := range found {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			if !HasGlob(elem) {
				name := Join(dir, elem)
				_, err := fsys.Lstat(name)
				if err == nil {
					next = append(next, name)
				} else if errors.Is(err, diskfs.ErrCorrupt) || errors.Is(err, diskfs.ErrLost) {
					if err := fail(name, err); err != nil {
						return nil, err
					}
				}
				continue
			}
			matches, damage, err := match(fsys, dir, elem, pattern)
			if err != nil {
				return nil, err
			}
			if damage != nil {
				if err := fail(dir, damage); err != nil {
					return nil, err
				}
			}
			next = append(next, matches...)
		}
		found = next
	}
	if len(found) == 0 {
		return nil, &fs.PathError{Op: "glob", Path: pattern, Err: fs.ErrNotExist}
	}
	return found, nil
}

// match lists the matches of an element of a pattern in a directory, and the error of what
// cannot be read there.
func match(fsys diskfs.FileSystem, dir, elem, pattern string) (names []string, damage, err error) {
	e, err := Stat(fsys, dir)
	if err != nil || !e.IsDir() {
		return nil, nil, nil // nothing matches
	}
	node, err := e.Node()
	if err != nil {
		return nil, err, nil
	}
	var faults diskfs.Faults
	for d, err := range node.Entries() {
		if err != nil {
			if !faults.Add(e.err("readdir", err)) {
				break
			}
			continue
		}
		ok, err := path.Match(elem, d.Name)
		if err != nil {
			return nil, nil, &fs.PathError{Op: "glob", Path: pattern, Err: err}
		}
		if ok && (d.Name[0] != '.' || elem[0] == '.') {
			names = append(names, Join(dir, d.Name))
		}
	}
	slices.Sort(names)
	for i := 1; i < len(names); i++ {
		if names[i] == names[i-1] {
			faults.Add(e.err("readdir", e.twice(path.Base(names[i]))))
		}
	}
	names = slices.Compact(names)
	return names, faults.Err(), nil
}

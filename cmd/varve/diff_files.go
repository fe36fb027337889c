package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"

	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/disk"
)

// errOtherVolume refuses to compare the files of different volumes.
var errOtherVolume = errors.New("the points are of different volumes: files are compared between two points of one volume ('varve diff' without --files compares any two disks)")

// fileChange is a line of "varve diff --files -o json".
type fileChange struct {
	Change string    `json:"change"` // added, removed or changed
	Path   string    `json:"path"`
	What   []string  `json:"what,omitempty"` // of a changed one, in the order of changes
	From   *fileInfo `json:"from,omitempty"`
	To     *fileInfo `json:"to,omitempty"`
}

func (a *app) diffFiles(ctx context.Context, repo *repository.Repository, from, to string, stale bool) (err error) {
	points, err := a.pointsNamed(ctx, repo, []string{from, to}, "")
	if err != nil {
		return err
	}
	if points[0].Volume != points[1].Volume {
		return fmt.Errorf("%s, %s: %w", points[0].Name(), points[1].Name(), errOtherVolume)
	}
	leases := newHolder(repo, "diff", holdLate, a.log)
	defer leases.release(ctx)
	var files [2]*pointFiles
	for i, p := range points {
		if err := leases.hold(ctx, p); err != nil {
			return err
		}
		if files[i], err = openPointFiles(ctx, repo, image.NewCache(versionCacheBytes), p); err != nil {
			return err
		}
		defer files[i].Close()
	}
	out := bufio.NewWriter(a.stdout)
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	counts := map[string]int{}
	d := &filesDiff{ctx: ctx, opt: diskfs.Options{Stale: stale}, files: files, tell: func(c fileChange) error {
		counts[c.Change]++
		if a.flags.output == "json" {
			return enc.Encode(c) //nolint:wrapcheck // told as what could not be printed
		}
		_, err := fmt.Fprintln(out, c.line())
		return err //nolint:wrapcheck // likewise
	}}
	if err := d.run(); err != nil {
		return fmt.Errorf("compare %s with %s: %w", points[1].Name(), points[0].Name(), err)
	}
	if a.flags.output != "json" {
		fmt.Fprintf(out, "%d added, %d removed, %d changed\n", counts["added"], counts["removed"], counts["changed"])
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	return nil
}

// line is a change as the table shows it.
func (c fileChange) line() string {
	switch c.Change {
	case "added":
		return "+ " + quoted(c.Path)
	case "removed":
		return "- " + quoted(c.Path)
	}
	return "M " + quoted(c.Path) + "  (" + strings.Join(c.What, ", ") + ")"
}

// filesDiff compares the files of two points, in order of their paths, a directory
// before what is in it.
type filesDiff struct {
	ctx   context.Context //nolint:containedctx // lives for one comparison
	opt   diskfs.Options
	files [2]*pointFiles // older, newer
	tell  func(fileChange) error
}

// side is a volume of one point.
type side struct {
	files *pointFiles
	on    *disk.Volume
	fsys  diskfs.FileSystem
	root  string // what stands before its paths

	visited browse.Visited
}

// run compares volumes of the same name. Those without a file system in both points are left
// out; one that cannot be read is an error.
func (d *filesDiff) run() error {
	names := map[string]bool{}
	var volumes [2]map[string]*disk.Volume
	for i, f := range d.files {
		volumes[i] = map[string]*disk.Volume{}
		for _, v := range f.disk.Volumes {
			volumes[i][v.Name] = v
			names[v.Name] = true
		}
	}
	sorted := make([]string, 0, len(names))
	for n := range names {
		sorted = append(sorted, n)
	}
	slices.Sort(sorted)
	compared := 0
	for _, name := range sorted {
		var sides [2]*side
		var failed error
		for i, v := range []*disk.Volume{volumes[0][name], volumes[1][name]} {
			if v == nil {
				continue
			}
			fsys, err := v.Open(d.opt)
			switch {
			case err == nil:
				sides[i] = &side{files: d.files[i], on: v, fsys: fsys, visited: browse.Visited{}}
				if name != "" {
					sides[i].root = "/" + name
				}
			case !nothingToCompare(err) || name == "":
				failed = errors.Join(failed, d.files[i].named(v, err))
			}
		}
		if failed != nil {
			return failed
		}
		if sides[0] == nil && sides[1] == nil {
			continue
		}
		compared++
		if err := d.pair(".", sides); err != nil {
			return err
		}
	}
	if compared == 0 {
		return errors.New("there is no file system that can be read")
	}
	return nil
}

// nothingToCompare reports whether a volume holds no files that could be read here.
func nothingToCompare(err error) bool {
	return errors.Is(err, diskfs.ErrNotRecognised) || errors.Is(err, diskfs.ErrUnsupported) && !errors.Is(err, diskfs.ErrDirtyLog)
}

// pair compares what both sides have under one path, each of which may have nothing.
func (d *filesDiff) pair(name string, sides [2]*side) error {
	if err := d.ctx.Err(); err != nil {
		return err //nolint:wrapcheck // cancelled
	}
	var states [2]*fileState
	for i, s := range sides {
		if s == nil {
			continue
		}
		st, err := s.state(name)
		if err != nil {
			return err
		}
		states[i] = st
	}
	if err := d.change(name, sides, states); err != nil {
		return err
	}
	for i, s := range states {
		if s == nil || s.stat.Mode&syscall.S_IFMT != syscall.S_IFDIR {
			sides[i] = nil
			continue
		}
		if err := sides[i].visited.Add(sides[i].fsys, &browse.Entry{Path: name, Stat: s.stat}); err != nil {
			return err //nolint:wrapcheck // names the path itself
		}
	}
	return d.below(name, sides)
}

// below compares what directories hold.
func (d *filesDiff) below(dir string, sides [2]*side) error {
	has := map[string][2]bool{}
	for i, s := range sides {
		if s == nil {
			continue
		}
		list, err := s.fsys.ReadDir(dir)
		if err != nil {
			return err //nolint:wrapcheck // names the path itself
		}
		for _, e := range list {
			h := has[e.Name()]
			h[i] = true
			has[e.Name()] = h
		}
	}
	names := make([]string, 0, len(has))
	for n := range has {
		names = append(names, n)
	}
	slices.Sort(names)
	if strings.Count(dir, "/") >= maxDiffDepth {
		return fmt.Errorf("%s: directories are nested too deeply", dir)
	}
	for _, n := range names {
		next := sides
		for i := range next {
			if !has[n][i] {
				next[i] = nil
			}
		}
		if err := d.pair(browse.Join(dir, n), next); err != nil {
			return err
		}
	}
	return nil
}

// maxDiffDepth bounds a walk: a hostile directory may be inside itself.
const maxDiffDepth = 4096

// state reads the metadata of a file.
func (s *side) state(name string) (*fileState, error) {
	st, err := s.fsys.Lstat(name)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the path itself
	}
	info, err := describe(s.fsys, name, st)
	if err != nil {
		return nil, err
	}
	out := &fileState{files: s.files, on: s.on, info: info}
	out.stat, _ = st.Sys().(*diskfs.Stat)
	return out, nil
}

// change tells what became of one path.
func (d *filesDiff) change(name string, sides [2]*side, states [2]*fileState) error {
	c := fileChange{}
	for i, s := range states {
		if s == nil {
			continue
		}
		c.Path = sides[i].root + "/" + name
		if name == "." {
			c.Path = sides[i].root + "/"
		}
		info := s.info
		info.Name = c.Path[strings.LastIndexByte(c.Path, '/')+1:]
		if i == 0 {
			c.From = &info
		} else {
			c.To = &info
		}
	}
	switch {
	case states[0] == nil:
		c.Change = "added"
	case states[1] == nil:
		c.Change = "removed"
	default:
		c.Change = "changed"
		var err error
		if c.What, err = d.differences(name, sides, states); err != nil || len(c.What) == 0 {
			return err
		}
	}
	return d.tell(c)
}

// differences lists what a file is changed in. Sizes, times and links of directories follow
// what is in them, and do not count.
func (d *filesDiff) differences(name string, sides [2]*side, states [2]*fileState) (what []string, err error) {
	x, y := states[0].stat, states[1].stat
	add := func(is bool, word string) {
		if is {
			what = append(what, word)
		}
	}
	typ := x.Mode & syscall.S_IFMT
	add(typ != y.Mode&syscall.S_IFMT, "type")
	if len(what) == 0 {
		changed := states[0].info.Target != states[1].info.Target || x.Major != y.Major || x.Minor != y.Minor
		if typ == syscall.S_IFREG {
			if changed, err = d.contentChanged(name, sides, states); err != nil {
				return nil, err
			}
		}
		add(changed, "content")
	}
	add((x.Mode^y.Mode)&0o7777 != 0, "mode")
	add(x.UID != y.UID || x.GID != y.GID, "owner")
	same, err := sameXattrs(name, sides)
	if err != nil {
		return nil, err
	}
	add(!same, "attributes")
	if typ != syscall.S_IFDIR {
		add(!x.Mtime.Equal(y.Mtime), "time")
		add(x.Nlink != y.Nlink, "links")
	}
	return what, nil
}

func sameXattrs(name string, sides [2]*side) (bool, error) {
	var lists [2][]diskfs.Xattr
	for i, s := range sides {
		var err error
		if lists[i], err = s.fsys.Xattrs(name); err != nil {
			return false, err //nolint:wrapcheck // names the path itself
		}
	}
	return slices.EqualFunc(lists[0], lists[1], func(a, b diskfs.Xattr) bool {
		return a.Name == b.Name && bytes.Equal(a.Value, b.Value)
	}), nil
}

// contentChanged compares two regular files: by size, then where the disk changed below
// them.
func (d *filesDiff) contentChanged(name string, sides [2]*side, states [2]*fileState) (bool, error) {
	if states[0].stat.Size != states[1].stat.Size {
		return true, nil
	}
	for i, s := range sides {
		f, err := s.fsys.Open(name)
		if err != nil {
			return false, err //nolint:wrapcheck // names the path itself
		}
		defer f.Close()
		var ok bool
		if states[i].file, ok = f.(diskfs.File); !ok {
			return false, &fs.PathError{Op: "compare", Path: name, Err: fs.ErrInvalid}
		}
	}
	same, err := sameContent(d.ctx, states[0], states[1])
	if errors.Is(err, diskfs.ErrUnsupported) { // encrypted, say: its metadata is all there is
		return false, nil
	}
	return !same, err
}

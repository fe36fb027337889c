package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
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
	Change string    `json:"change"` // added, removed or changed; unknown where damage hides which
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
		if files[i], err = openPointFiles(ctx, repo, image.NewCache(versionCacheBytes), p, a.log); err != nil {
			return err
		}
		defer files[i].Close()
	}
	out := bufio.NewWriter(a.stdout)
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	counts := map[string]int{}
	report := &damageReport{app: a, ctx: ctx}
	d := &filesDiff{ctx: ctx, opt: diskfs.Options{Stale: stale}, files: files, report: report, tell: func(c fileChange) error {
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
		fmt.Fprintf(out, "%d added, %d removed, %d changed", counts["added"], counts["removed"], counts["changed"])
		if n := counts["unknown"]; n > 0 {
			fmt.Fprintf(out, ", %d could not be compared", n)
		}
		fmt.Fprintln(out)
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	return report.err()
}

// line is a change as the table shows it.
func (c fileChange) line() string {
	switch c.Change {
	case "added":
		return "+ " + quoted(c.Path)
	case "removed":
		return "- " + quoted(c.Path)
	case "unknown":
		return "? " + quoted(c.Path) + "  (could not be compared)"
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

	report *damageReport
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
			fsys, err := d.files[i].open(v, d.opt)
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
		var roots [2]*browse.Entry
		for i, side := range sides {
			if side == nil {
				continue
			}
			root, err := browse.Lstat(side.fsys, ".")
			if err != nil {
				return d.files[i].named(side.on, err)
			}
			roots[i] = root
		}
		if err := d.pair(".", sides, roots); err != nil {
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
func (d *filesDiff) pair(name string, sides [2]*side, entries [2]*browse.Entry) error {
	if err := d.ctx.Err(); err != nil {
		return err //nolint:wrapcheck // cancelled
	}
	var states [2]*fileState
	for i, e := range entries {
		if e == nil {
			continue
		}
		info, err := describe(e)
		if err != nil {
			if err := d.fail(sides[i], name, err); err != nil {
				return err
			}
			return d.unknown(name, sides, [2]bool{entries[0] != nil, entries[1] != nil})
		}
		states[i] = &fileState{files: sides[i].files, on: sides[i].on, info: info, stat: e.Stat}
	}
	if err := d.change(name, sides, states, entries); err != nil {
		return err
	}
	for i, e := range entries {
		if e == nil || !e.IsDir() {
			sides[i], entries[i] = nil, nil
			continue
		}
		if err := sides[i].visited.Add(sides[i].fsys, e); err != nil {
			return d.fail(sides[i], name, err)
		}
	}
	if entries[0] == nil && entries[1] == nil {
		return nil
	}
	return d.below(name, sides, entries)
}

// fail names what cannot be read in one of the points.
func (d *filesDiff) fail(s *side, name string, err error) error {
	return d.report.fail(s.files.point.Name(), strings.TrimPrefix(s.root+"/"+name, "/"), err)
}

// unknown tells of a path that cannot be compared.
func (d *filesDiff) unknown(name string, sides [2]*side, in [2]bool) error {
	root := ""
	for i, s := range sides {
		if in[i] && s != nil {
			root = s.root
		}
	}
	return d.tell(fileChange{Change: "unknown", Path: root + rooted(name)})
}

// below compares what directories hold. A name that only one of them shows is an unknown
// where the other cannot be read in whole.
func (d *filesDiff) below(name string, sides [2]*side, entries [2]*browse.Entry) (err error) {
	if strings.Count(name, "/") >= maxDiffDepth {
		return fmt.Errorf("%s: directories are nested too deeply", name)
	}
	var damaged [2]bool
	var lists [2]childList
	for i, e := range entries {
		if e == nil {
			continue
		}
		dir, err := browse.ReadDir(d.ctx, e)
		if err != nil {
			return err //nolint:wrapcheck // names the path itself
		}
		defer func() { err = errors.Join(err, dir.Close()) }()
		if damage := dir.Damage(); damage != nil {
			damaged[i] = true
			if err := d.fail(sides[i], name, damage); err != nil {
				return err
			}
		}
		var stop func()
		lists[i].next, stop = iter.Pull2(dir.All())
		defer stop()
	}
	for {
		children, err := nextChildren(&lists)
		if err != nil || children == [2]*browse.Child{} {
			return err
		}
		if err := d.child(sides, children, damaged); err != nil {
			return err
		}
	}
}

// child compares one name of a directory.
func (d *filesDiff) child(sides [2]*side, children [2]*browse.Child, damaged [2]bool) error {
	var next [2]*side
	var entries [2]*browse.Entry
	var in [2]bool
	name, unknown := "", false
	for i, c := range children {
		if c == nil {
			unknown = unknown || damaged[i]
			continue
		}
		name, in[i], next[i], entries[i] = c.Path, true, sides[i], c.Entry
		if c.Err != nil {
			unknown = true
			if err := d.fail(sides[i], c.Path, c.Err); err != nil {
				return err
			}
		}
	}
	if unknown {
		return d.unknown(name, sides, in)
	}
	return d.pair(name, next, entries)
}

// childList is a directory that is being gone through.
type childList struct {
	next func() (browse.Child, error, bool)
	head *browse.Child // nil before the first and after the last
	done bool
}

// fill reads the next child, unless there is one.
func (l *childList) fill() error {
	if l.next == nil || l.head != nil || l.done {
		return nil
	}
	c, err, ok := l.next()
	if err != nil {
		return err //nolint:wrapcheck // names the path itself
	}
	if l.done = !ok; ok {
		l.head = &c
	}
	return nil
}

// nextChildren takes the least name from both lists, of those that have it.
func nextChildren(lists *[2]childList) (out [2]*browse.Child, err error) {
	least := ""
	for i := range lists {
		if err := lists[i].fill(); err != nil {
			return out, err
		}
		if c := lists[i].head; c != nil && (least == "" || c.Name() < least) {
			least = c.Name()
		}
	}
	for i := range lists {
		if c := lists[i].head; c != nil && c.Name() == least {
			out[i], lists[i].head = c, nil
		}
	}
	return out, nil
}

// maxDiffDepth bounds a walk: a hostile directory may be inside itself.
const maxDiffDepth = 4096

// change tells what became of one path.
func (d *filesDiff) change(name string, sides [2]*side, states [2]*fileState, entries [2]*browse.Entry) error {
	c := fileChange{}
	for i, s := range states {
		if s == nil {
			continue
		}
		c.Path = sides[i].root + rooted(name)
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
		var failed bool
		var err error
		if c.What, failed, err = d.differences(name, sides, states, entries); err != nil {
			return err
		}
		if len(c.What) == 0 {
			if !failed {
				return nil
			}
			c.Change = "unknown"
		}
	}
	return d.tell(c)
}

// differences lists what a file is changed in; failed tells that some of it could not be
// compared. Sizes, times and links of directories follow what is in them, and do not count.
func (d *filesDiff) differences(name string, sides [2]*side, states [2]*fileState, entries [2]*browse.Entry) (what []string, failed bool, err error) {
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
			if changed, err = d.contentChanged(states, entries); err != nil {
				failed = true
				if err := d.fail(sides[1], name, fmt.Errorf("compare content: %w", err)); err != nil {
					return nil, true, err
				}
			}
		}
		add(changed, "content")
	}
	add((x.Mode^y.Mode)&0o7777 != 0, "mode")
	add(x.UID != y.UID || x.GID != y.GID, "owner")
	var lists [2][]diskfs.Xattr
	whole := true
	for i, e := range entries {
		if lists[i], err = e.Xattrs(); err != nil {
			whole, failed = false, true
			if err := d.fail(sides[i], name, &browse.PartialError{Missing: "attributes", Err: withoutPath(err)}); err != nil {
				return nil, true, err
			}
		}
	}
	add(whole && !sameXattrs(lists), "attributes")
	if typ != syscall.S_IFDIR {
		add(!x.Mtime.Equal(y.Mtime), "time")
		add(x.Nlink != y.Nlink, "links")
	}
	return what, failed, nil
}

func sameXattrs(lists [2][]diskfs.Xattr) bool {
	return slices.EqualFunc(lists[0], lists[1], func(a, b diskfs.Xattr) bool {
		return a.Name == b.Name && bytes.Equal(a.Value, b.Value)
	})
}

// contentChanged compares two regular files: by size, then where the disk changed below
// them.
func (d *filesDiff) contentChanged(states [2]*fileState, entries [2]*browse.Entry) (bool, error) {
	if states[0].stat.Size != states[1].stat.Size {
		return true, nil
	}
	for i, e := range entries {
		f, err := e.Open()
		if err != nil {
			return false, err //nolint:wrapcheck // names the path itself
		}
		defer f.Close()
		states[i].file = f
	}
	same, err := sameContent(d.ctx, states[0], states[1])
	if errors.Is(err, diskfs.ErrUnsupported) { // encrypted, say: its metadata is all there is
		return false, nil
	}
	return !same && err == nil, err
}

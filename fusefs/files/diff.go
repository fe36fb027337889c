package files

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"syscall"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// Change is a file that differs between two points.
type Change struct {
	Change string   `json:"change"` // added, removed or changed; unknown if damage hides which
	Path   string   `json:"path"`
	What   []string `json:"what,omitempty"` // of a changed file, what changed
	From   *Info    `json:"from,omitempty"`
	To     *Info    `json:"to,omitempty"`
}

// Report receives what a comparison finds. An error of its functions ends the comparison.
type Report struct {
	Change func(Change) error
	// Damaged receives what cannot be read of a file in one of the points.
	Damaged func(p *points.Point, name string, err error) error
}

// Compare lists the files that were added, removed or changed between two points of one
// volume: by metadata, and by content only where the disk changed below a file.
func Compare(ctx context.Context, older, newer *Point, opt diskfs.Options, report Report) error {
	d := &comparison{ctx: ctx, opt: opt, files: [2]*Point{older, newer}, report: report}
	return d.run()
}

// comparison compares the files of two points, in order of their paths, each directory before
// its content.
type comparison struct {
	ctx    context.Context // of one comparison
	opt    diskfs.Options
	files  [2]*Point // older, newer
	report Report
}

// side is a volume of one point.
type side struct {
	files *Point
	on    *volumes.Volume
	fsys  diskfs.FileSystem
	root  string // prefix of its paths

	visited browse.Visited
}

// run compares volumes of the same name. Volumes without a file system in both points are
// skipped; one that cannot be read is an error.
func (d *comparison) run() error {
	names := map[string]bool{}
	var vols [2]map[string]*volumes.Volume
	for i, f := range d.files {
		vols[i] = map[string]*volumes.Volume{}
		for _, v := range f.disk.Volumes {
			vols[i][v.Name] = v
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
		for i, v := range []*volumes.Volume{vols[0][name], vols[1][name]} {
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

// nothingToCompare reports whether a volume has no files that Varve can read.
func nothingToCompare(err error) bool {
	return errors.Is(err, diskfs.ErrNotRecognised) || errors.Is(err, diskfs.ErrUnsupported) && !errors.Is(err, diskfs.ErrDirtyLog)
}

// pair compares the entries of both sides under one path; each may be nil.
func (d *comparison) pair(name string, sides [2]*side, entries [2]*browse.Entry) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	var states [2]*state
	for i, e := range entries {
		if e == nil {
			continue
		}
		info, err := Describe(e)
		if err != nil {
			if err := d.fail(sides[i], name, err); err != nil {
				return err
			}
			return d.unknown(name, sides, [2]bool{entries[0] != nil, entries[1] != nil})
		}
		states[i] = &state{files: sides[i].files, on: sides[i].on, info: info, stat: e.Stat}
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

// fail reports what cannot be read in one of the points.
func (d *comparison) fail(s *side, name string, err error) error {
	return d.report.Damaged(s.files.point, strings.TrimPrefix(s.root+"/"+name, "/"), err)
}

// unknown reports a path that cannot be compared.
func (d *comparison) unknown(name string, sides [2]*side, in [2]bool) error {
	root := ""
	for i, s := range sides {
		if in[i] && s != nil {
			root = s.root
		}
	}
	return d.report.Change(Change{Change: "unknown", Path: root + Rooted(name)})
}

// below compares the content of directories. A name that only one of them shows is unknown if
// the other cannot be read completely.
func (d *comparison) below(name string, sides [2]*side, entries [2]*browse.Entry) (err error) {
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
			return err
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
func (d *comparison) child(sides [2]*side, children [2]*browse.Child, damaged [2]bool) error {
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

// childList is a directory being listed.
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
		return err
	}
	if l.done = !ok; ok {
		l.head = &c
	}
	return nil
}

// nextChildren takes the least name from the lists that have it.
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

// maxDiffDepth bounds a walk: a hostile directory may contain itself.
const maxDiffDepth = 4096

// change reports how one path differs.
func (d *comparison) change(name string, sides [2]*side, states [2]*state, entries [2]*browse.Entry) error {
	c := Change{}
	for i, s := range states {
		if s == nil {
			continue
		}
		c.Path = sides[i].root + Rooted(name)
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
	return d.report.Change(c)
}

// differences lists what differs of a file; failed means that part of it could not be
// compared. Size, times and links of a directory depend on its content, and do not count.
func (d *comparison) differences(name string, sides [2]*side, states [2]*state, entries [2]*browse.Entry) (what []string, failed bool, err error) {
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
			if err := d.fail(sides[i], name, &browse.PartialError{Missing: "attributes", Err: WithoutPath(err)}); err != nil {
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
func (d *comparison) contentChanged(states [2]*state, entries [2]*browse.Entry) (bool, error) {
	if states[0].stat.Size != states[1].stat.Size {
		return true, nil
	}
	for i, e := range entries {
		f, err := e.Open()
		if err != nil {
			return false, err
		}
		defer f.Close()
		states[i].file = f
	}
	same, err := sameContent(d.ctx, states[0], states[1])
	if errors.Is(err, diskfs.ErrUnsupported) { // encrypted, for example: only metadata can be compared
		return false, nil
	}
	return !same && err == nil, err
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/files"
)

func newLsCommand(a *app) *cobra.Command {
	var stale, versions, recursive bool
	cmd := &cobra.Command{
		Use:     "ls POINT[:/PATH]...",
		GroupID: groupRead,
		Short:   "List files of a recovery point",
		Long: `List directories and files inside recovery points, without a mount and without
root. Paths may have the wildcards *, ? and [] (quote them for the shell).

On a disk with partitions or logical volumes the root lists them; a path then
starts with one's name: shop/vm@latest:/p1/etc.

With --versions the argument is VOLUME:/PATH, and the states that the file had in
the volume's recovery points are listed, each with the first and the last point
that has it. Metadata is compared, and of content only what changed on the disk.`,
		Example: `  varve ls shop/db@latest:/var/lib
  varve ls -R shop/db@latest:/etc
  varve ls 'shop/db@latest:/etc/*.conf'
  varve ls shop/db@latest~2 -o json
  varve ls --versions shop/db:/etc/fstab`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if versions {
				if len(args) > 1 || recursive {
					return usagef("--versions is for one file")
				}
				return a.versions(cmd.Context(), args[0], stale)
			}
			return a.ls(cmd.Context(), args, recursive, stale)
		},
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "R", false, "list directories with all that is below")
	cmd.Flags().BoolP("long", "l", false, "long format, which is always used")
	if err := cmd.Flags().MarkHidden("long"); err != nil { // since users type it by habit
		panic(err)
	}
	cmd.Flags().BoolVar(&versions, "versions", false, "list the states of a file across a volume's recovery points")
	addStaleFlag(cmd, &stale)
	return cmd
}

type volumeInfo struct {
	Name string `json:"name"`
	Type string `json:"type"`
	Size int64  `json:"size"`
	Note string `json:"note,omitempty"` // why it cannot be read, or a note about it
}

func (a *app) ls(ctx context.Context, args []string, recursive, stale bool) error {
	return a.withFiles(ctx, "ls", disks.Late, func(open opener, report *damageReport) error {
		l := &lister{damageReport: report, recursive: recursive}
		if a.flags.output == "json" {
			l.json = a.newJSONList()
		}
		err := l.arguments(open, args, stale)
		if l.json != nil && !l.volumes {
			err = l.json.end(err)
		}
		return err
	})
}

// lister lists files and directories one by one.
type lister struct {
	*damageReport
	json      *jsonList // nil for tables
	recursive bool
	titled    bool // show a directory's name above its table
	printed   bool
	volumes   bool // a list of volumes was printed instead
}

func (l *lister) arguments(open opener, args []string, stale bool) error {
	for _, arg := range args {
		from, fsys, names, err := open(l.ctx, arg, stale)
		if err != nil {
			return err
		}
		if fsys == nil {
			if len(args) > 1 || l.recursive {
				return fmt.Errorf("%s is a list of volumes: name one of %s", arg, strings.Join(from.VolumeNames(), ", "))
			}
			l.volumes = true
			return l.app.lsVolumes(from)
		}
		l.titled = l.recursive || len(args) > 1 || len(names) > 1
		if err := l.list(from, fsys, names); err != nil {
			return from.Explain(err)
		}
	}
	return nil
}

// list lists what one argument names: first other files, then directories.
func (l *lister) list(from *files.Point, fsys diskfs.FileSystem, names []string) error {
	var plain, dirs []string
	for _, name := range names {
		e, err := l.entry(fsys, name, len(names) > 1)
		if err != nil {
			return err
		}
		if e.IsDir() {
			dirs = append(dirs, name)
		} else {
			plain = append(plain, name)
		}
	}
	point := from.Name()
	if len(plain) > 0 {
		err := l.show("", func(add func(files.Info) error) error {
			for _, name := range plain {
				e, err := l.entry(fsys, name, true)
				if err != nil {
					return err
				}
				f, err := l.describe(point, e)
				if err != nil {
					return err
				}
				if f.Path = files.Rooted(name); len(names) > 1 {
					f.Name = f.Path
				}
				if err := add(f); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	visited := browse.Visited{}
	for _, dir := range dirs {
		e, err := l.entry(fsys, dir, len(names) > 1)
		if err != nil {
			return err
		}
		if err := l.directory(point, fsys, e, visited); err != nil {
			return err
		}
	}
	return nil
}

// entry returns the entry to list for a name: if a link is named alone, the directory that it
// leads to.
func (l *lister) entry(fsys diskfs.FileSystem, name string, several bool) (*browse.Entry, error) {
	e, err := browse.Lstat(fsys, name)
	if err == nil && e.Info.Mode()&fs.ModeSymlink != 0 && !several {
		if to, err := browse.Stat(fsys, name); err == nil && to.IsDir() {
			return to, nil
		}
	}
	return e, err
}

// describe returns the line of an entry. A link whose target cannot be read still has a line.
func (l *lister) describe(point string, e *browse.Entry) (files.Info, error) {
	f, err := files.Describe(e)
	if err == nil {
		return f, nil
	}
	f.Error = message(err)
	return f, l.fail(point, e.Path, err)
}

// directory lists a directory and, if requested, the directories below.
func (l *lister) directory(point string, fsys diskfs.FileSystem, e *browse.Entry, visited browse.Visited) (err error) {
	dir, err := browse.ReadDir(l.ctx, e)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if err := dir.Damage(); err != nil {
		if err := l.fail(point, e.Path, err); err != nil {
			return err
		}
	}
	err = l.show(point+":"+files.Rooted(e.Path), func(add func(files.Info) error) error {
		for c, err := range dir.All() {
			if err != nil {
				return err
			}
			f := files.Info{Name: c.Name(), Mode: unknownMode}
			if c.Err == nil {
				if f, err = l.describe(point, c.Entry); err != nil {
					return err
				}
			} else {
				if err := l.fail(point, c.Path, c.Err); err != nil {
					return err
				}
				f.Error = message(c.Err)
			}
			f.Path = files.Rooted(c.Path)
			if err := add(f); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || !l.recursive {
		return err
	}
	if err := dir.KeepDirectories(); err != nil {
		return err
	}
	for c, err := range dir.All() {
		if err != nil {
			return err
		}
		if err := visited.Add(fsys, c.Entry); err != nil {
			if err := l.fail(point, c.Path, err); err != nil {
				return err
			}
			continue
		}
		if err := l.directory(point, fsys, c.Entry, visited); err != nil {
			return err
		}
	}
	return nil
}

// show prints what list adds, as a table or as elements of JSON.
func (l *lister) show(title string, list func(add func(files.Info) error) error) error {
	if l.json != nil {
		return list(func(f files.Info) error { return l.json.add(f) })
	}
	var failed error
	err := l.app.print(nil, func(t *table) {
		if l.titled && title != "" {
			if l.printed {
				t.line("")
			}
			t.line("%s:", quoted(title))
		}
		l.printed = true
		t.row("MODE", "LINKS", "UID", "GID", "SIZE", "MODIFIED", "NAME")
		failed = list(func(f files.Info) error {
			fileRow(t, f)
			return t.err
		})
	})
	return errors.Join(failed, err)
}

// fileRow adds the line of a file to a table.
func fileRow(t *table, f files.Info) {
	shown := quoted(f.Name)
	if f.Mode == unknownMode {
		t.row(f.Mode, "?", "?", "?", "?", "?", shown)
		return
	}
	switch {
	case f.Target != "":
		shown += " -> " + quoted(f.Target)
	case f.Error != "":
		shown += " -> ?"
	}
	t.row(f.Mode, f.Links, f.UID, f.GID, f.Size, t.time(f.ModTime), shown)
}

func (a *app) lsVolumes(from *files.Point) error {
	list := []volumeInfo{}
	noted := false
	for _, v := range from.Disk().Volumes {
		info := volumeInfo{Name: v.Name, Type: v.Type, Size: v.Size, Note: v.Note}
		if err := v.Unmountable(); errors.Is(err, diskfs.ErrCorrupt) { // for others the type is enough
			info.Note = err.Error()
		}
		noted = noted || info.Note != ""
		list = append(list, info)
	}
	if t := from.Disk().Table; t != nil && t.Reason != "" {
		a.log.Warn("the partition table is damaged: "+t.Reason, "point", from.Name(), "backupCopyUsed", t.FromBackup)
	}
	return a.print(list, func(t *table) {
		if !noted {
			t.row("VOLUME", "TYPE", "SIZE")
		} else {
			t.row("VOLUME", "TYPE", "SIZE", "NOTE")
		}
		for _, v := range list {
			if !noted {
				t.row(v.Name, v.Type, t.bytes(v.Size))
			} else {
				t.row(v.Name, v.Type, t.bytes(v.Size), v.Note)
			}
		}
	})
}

// unknownMode is the mode of a file that cannot be read.
const unknownMode = "??????????"

package main

import (
	"context"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
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
	cmd.Flags().BoolVar(&versions, "versions", false, "list the states of a file across a volume's recovery points")
	addStaleFlag(cmd, &stale)
	return cmd
}

// fileInfo is what "varve ls -o json" prints of a file.
type fileInfo struct {
	Name    string    `json:"name"`
	Path    string    `json:"path,omitempty"` // on its volume, from the root
	Mode    string    `json:"mode"`
	Links   uint64    `json:"links"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	Size    int64     `json:"size"`
	ModTime time.Time `json:"modTime"`
	Target  string    `json:"target,omitempty"` // of a symbolic link
}

type volumeInfo struct {
	Name string `json:"name"`
	Type string `json:"type"`
	Size int64  `json:"size"`
}

func (a *app) ls(ctx context.Context, args []string, recursive, stale bool) error {
	return a.withFiles(ctx, func(open opener) error {
		l := &lister{app: a, ctx: ctx, recursive: recursive, all: []fileInfo{}}
		for _, arg := range args {
			files, fsys, names, err := open(ctx, arg, stale)
			if err != nil {
				return err
			}
			if fsys == nil {
				if len(args) > 1 || recursive {
					return fmt.Errorf("%s is a list of volumes: name one of %s", arg, strings.Join(files.volumeNames(), ", "))
				}
				return a.lsVolumes(files)
			}
			l.titled = recursive || len(args) > 1 || len(names) > 1
			if err := l.list(files, fsys, names); err != nil {
				return fmt.Errorf("%s: %w", files.point.Name(), err)
			}
		}
		if a.flags.output == "json" {
			return a.print(l.all, nil)
		}
		return nil
	})
}

// lister lists files and directories: tables as they come, JSON at the end.
type lister struct {
	app       *app
	ctx       context.Context //nolint:containedctx // lives for one listing
	recursive bool
	titled    bool // a directory's name stands above its table
	printed   bool
	all       []fileInfo
}

// list lists what one argument names: first what is no directory, then directories.
func (l *lister) list(files *pointFiles, fsys diskfs.FileSystem, names []string) error {
	var plain []fileInfo
	var dirs []string
	for _, name := range names {
		st, err := fsys.Lstat(name)
		if err != nil {
			return err //nolint:wrapcheck // names the path itself
		}
		if st.Mode()&fs.ModeSymlink != 0 && len(names) == 1 {
			if to, err := fsys.Stat(name); err == nil && to.IsDir() {
				st = to
			}
		}
		if st.IsDir() {
			dirs = append(dirs, name)
			continue
		}
		f, err := describe(fsys, name, st)
		if err != nil {
			return err
		}
		f.Path = rooted(name)
		if len(names) > 1 {
			f.Name = f.Path
		}
		plain = append(plain, f)
	}
	if len(plain) > 0 {
		if err := l.show("", plain); err != nil {
			return err
		}
	}
	visited := browse.Visited{}
	for _, dir := range dirs {
		if err := l.directory(files.point.Name(), fsys, dir, visited); err != nil {
			return err
		}
	}
	return nil
}

// directory lists a directory and, if that was asked for, those below.
func (l *lister) directory(point string, fsys diskfs.FileSystem, dir string, visited browse.Visited) error {
	list, err := listDir(l.ctx, fsys, dir)
	if err != nil {
		return err
	}
	if err := l.show(point+":"+rooted(dir), list); err != nil || !l.recursive {
		return err
	}
	for _, f := range list {
		if !strings.HasPrefix(f.Mode, "d") {
			continue
		}
		name := browse.Join(dir, f.Name)
		e, err := browse.Lstat(fsys, name)
		if err == nil {
			err = visited.Add(fsys, e)
		}
		if err != nil {
			return err //nolint:wrapcheck // names the path itself
		}
		if err := l.directory(point, fsys, name, visited); err != nil {
			return err
		}
	}
	return nil
}

// show prints a table, or keeps what is for JSON.
func (l *lister) show(title string, list []fileInfo) error {
	if l.app.flags.output == "json" {
		l.all = append(l.all, list...)
		return nil
	}
	return l.app.print(nil, func(t *table) {
		if l.titled && title != "" {
			if l.printed {
				t.line("")
			}
			t.line("%s:", quoted(title))
		}
		l.printed = true
		t.row("MODE", "LINKS", "UID", "GID", "SIZE", "MODIFIED", "NAME")
		for _, f := range list {
			shown := quoted(f.Name)
			if f.Target != "" {
				shown += " -> " + quoted(f.Target)
			}
			t.row(f.Mode, f.Links, f.UID, f.GID, f.Size, t.time(f.ModTime), shown)
		}
	})
}

func (a *app) lsVolumes(files *pointFiles) error {
	list := []volumeInfo{}
	for _, v := range files.disk.Volumes {
		list = append(list, volumeInfo{v.Name, v.Type, v.Size})
	}
	return a.print(list, func(t *table) {
		t.row("VOLUME", "TYPE", "SIZE")
		for _, v := range list {
			t.row(v.Name, v.Type, t.bytes(v.Size))
		}
	})
}

// listDir lists a directory.
func listDir(ctx context.Context, fsys diskfs.FileSystem, name string) ([]fileInfo, error) {
	entries, err := fsys.ReadDir(name)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the path itself
	}
	list := make([]fileInfo, 0, len(entries))
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		st, err := e.Info()
		if err != nil {
			return nil, err //nolint:wrapcheck // names the path itself
		}
		child := e.Name()
		if name != "." {
			child = name + "/" + child
		}
		f, err := describe(fsys, child, st)
		if err != nil {
			return nil, err
		}
		f.Path = rooted(child)
		list = append(list, f)
	}
	return list, nil
}

func describe(fsys diskfs.FileSystem, name string, st fs.FileInfo) (fileInfo, error) {
	f := fileInfo{Name: st.Name(), Mode: st.Mode().String(), Size: st.Size(), ModTime: st.ModTime().UTC()}
	if s, ok := st.Sys().(*diskfs.Stat); ok {
		f.Links, f.UID, f.GID = uint64(s.Nlink), s.UID, s.GID
	}
	if st.Mode()&fs.ModeSymlink != 0 {
		to, err := fsys.ReadLink(name)
		if err != nil {
			return f, err //nolint:wrapcheck // names the path itself
		}
		f.Target = to
	}
	return f, nil
}

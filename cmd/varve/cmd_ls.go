package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/repository"
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
	cmd.Flags().BoolP("long", "l", false, "list everything known of a file, as is always done")
	if err := cmd.Flags().MarkHidden("long"); err != nil { // for the habit of typing it
		panic(err)
	}
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
	Error   string    `json:"error,omitempty"`  // why it cannot be read; the rest is then not known
}

type volumeInfo struct {
	Name string `json:"name"`
	Type string `json:"type"`
	Size int64  `json:"size"`
}

func (a *app) ls(ctx context.Context, args []string, recursive, stale bool) error {
	return a.withFiles(ctx, "ls", holdLate, func(open opener) error {
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
				return files.at(err)
			}
		}
		if a.flags.output == "json" {
			if err := a.print(l.all, nil); err != nil {
				return err
			}
		}
		return unreadable(l.failed)
	})
}

// unreadable is the error behind a listing that names what could not be read.
func unreadable(failed []error) error {
	if len(failed) == 0 {
		return nil
	}
	return &unreadableError{failed}
}

type unreadableError struct{ causes []error }

func (e *unreadableError) Error() string {
	if len(e.causes) == 1 {
		return "one file or directory could not be read: it is named above; all else is listed"
	}
	return fmt.Sprintf("%d files or directories could not be read: they are named above; all else is listed", len(e.causes))
}

// Unwrap gives all causes, for the exit code.
func (e *unreadableError) Unwrap() []error { return e.causes }

// lister lists files and directories: tables as they come, JSON at the end.
type lister struct {
	app       *app
	ctx       context.Context //nolint:containedctx // lives for one listing
	recursive bool
	titled    bool // a directory's name stands above its table
	printed   bool
	all       []fileInfo
	failed    []error // what could not be read
}

// fail names what cannot be read, and has the listing go on. Where the storage does not
// answer, nothing else could be read either.
func (l *lister) fail(point, name string, err error) error {
	if errors.Is(err, repository.ErrUnreachable) || l.ctx.Err() != nil {
		return err
	}
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	l.app.log.Error("cannot read", "file", point+":"+rooted(name), "error", err)
	l.failed = append(l.failed, err)
	return nil
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
	list, err := listDir(l.ctx, fsys, dir, func(name string, err error) error { return l.fail(point, name, err) })
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
			if err := l.fail(point, name, err); err != nil {
				return err
			}
			continue
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
			if f.Error != "" {
				t.row(f.Mode, "?", "?", "?", "?", "?", shown)
				continue
			}
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

// listDir lists a directory. fail is told of what cannot be read, and may have it go on by
// answering nil.
func listDir(ctx context.Context, fsys diskfs.FileSystem, name string, fail func(name string, err error) error) ([]fileInfo, error) {
	entries, err := fsys.ReadDir(name)
	if err != nil {
		if err := fail(name, err); err != nil {
			return nil, err
		}
	}
	list := make([]fileInfo, 0, len(entries))
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		child, f := browse.Join(name, e.Name()), fileInfo{}
		st, err := e.Info()
		if err == nil {
			f, err = describe(fsys, child, st)
		}
		if err != nil {
			if err := fail(child, err); err != nil {
				return nil, err
			}
			f = fileInfo{Name: e.Name(), Mode: "??????????", Error: message(err)}
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
		f.Mode = modeString(s.Mode)
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

// modeString is st_mode in the way of ls(1).
func modeString(mode uint32) string {
	b := []byte{typeLetter(mode)}
	if b[0] == 'f' {
		b[0] = '-'
	}
	for i, c := range "rwxrwxrwx" {
		if mode&(0o400>>i) == 0 {
			c = '-'
		}
		b = append(b, byte(c)) //nolint:gosec // an ASCII letter
	}
	for _, s := range []struct {
		bit    uint32
		at     int
		letter byte
	}{{0o4000, 3, 's'}, {0o2000, 6, 's'}, {0o1000, 9, 't'}} {
		if mode&s.bit == 0 {
			continue
		}
		if b[s.at] == '-' {
			s.letter -= 'a' - 'A' // nobody may execute it
		}
		b[s.at] = s.letter
	}
	return string(b)
}

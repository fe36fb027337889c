package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/files"
	"github.com/varve-io/varve/internal/bytesize"
)

func newStatCommand(a *app) *cobra.Command {
	var stale bool
	cmd := &cobra.Command{
		Use:     "stat POINT:/PATH...",
		GroupID: groupRead,
		Short:   "Show the details of files in a recovery point",
		Args:    cobra.MinimumNArgs(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return a.stat(cmd.Context(), args, stale) },
	}
	addStaleFlag(cmd, &stale)
	return cmd
}

// statInfo is what "varve stat -o json" prints of a file.
type statInfo struct {
	files.Info
	Point    string            `json:"point"`
	Path     string            `json:"path"`
	Inode    uint64            `json:"inode"`
	Blocks   int64             `json:"blocks"` // of 512 bytes
	Accessed time.Time         `json:"accessTime"`
	Changed  time.Time         `json:"changeTime"`
	Created  *time.Time        `json:"birthTime,omitempty"`
	Device   string            `json:"device,omitempty"`
	Xattrs   map[string]string `json:"xattrs,omitempty"` // base64
	// Damage lists what cannot be read: link target, attributes, the map of the content,
	// entries of a directory. Content itself is not read.
	Damage []string `json:"damage,omitempty"`
}

func (a *app) stat(ctx context.Context, args []string, stale bool) error {
	list := []statInfo{}
	err := a.eachFile(ctx, "stat", disks.Late, args, stale, func(from *files.Point, fsys diskfs.FileSystem, name string, _ bool, report *damageReport) error {
		e, err := browse.Lstat(fsys, name)
		if err != nil {
			return from.Explain(err)
		}
		s, err := statOf(e, func(what string, err error) error {
			return report.fail(from.Name(), name, &browse.PartialError{Missing: what, Err: files.WithoutPath(err)})
		})
		s.Point = from.Name()
		list = append(list, s)
		return err
	})
	if damaged := (*unreadableError)(nil); err != nil && !errors.As(err, &damaged) {
		return err
	}
	return errors.Join(err, a.print(list, func(t *table) {
		for _, s := range list {
			shown := s.Path
			if s.Target != "" {
				shown += " -> " + s.Target
			}
			t.line("File: %s", shown)
			t.line("  Mode: %s  Owner: %d:%d  Links: %d  Inode: %d", s.Mode, s.UID, s.GID, s.Links, s.Inode)
			t.line("  Size: %s, %s on disk", bytesize.Exact(s.Size), t.bytes(s.Blocks*512))
			if s.Device != "" {
				t.line("  Device: %s", s.Device)
			}
			t.line("  Modified: %s  Changed: %s  Accessed: %s", s.ModTime.Format(time.RFC3339Nano), s.Changed.Format(time.RFC3339Nano), s.Accessed.Format(time.RFC3339Nano))
			if s.Created != nil {
				t.line("  Created: %s", s.Created.Format(time.RFC3339Nano))
			}
			for _, name := range slices.Sorted(maps.Keys(s.Xattrs)) {
				t.line("  Attribute: %s=%s (base64)", name, s.Xattrs[name])
			}
			for _, what := range s.Damage {
				t.line("  Damage: %s", what)
			}
		}
	}))
}

// statOf collects all metadata of a file; fail is called for each part that cannot be read.
func statOf(e *browse.Entry, fail func(what string, err error) error) (statInfo, error) {
	st := e.Stat
	f, err := files.Describe(e)
	s := statInfo{
		Info: f, Path: files.Rooted(e.Path), Inode: st.Ino, Blocks: st.Blocks,
		Accessed: st.Atime.UTC(), Changed: st.Ctime.UTC(),
	}
	damaged := func(what string, err error) error {
		if err == nil {
			return nil
		}
		s.Damage = append(s.Damage, what+": "+message(files.WithoutPath(err)))
		return fail(what, err)
	}
	if err := damaged("the target", err); err != nil {
		return s, err
	}
	if !st.Btime.IsZero() {
		b := st.Btime.UTC()
		s.Created = &b
	}
	if letter := files.TypeLetter(st.Mode); letter == 'b' || letter == 'c' {
		s.Device = fmt.Sprintf("%d:%d", st.Major, st.Minor)
	}
	attrs, err := e.Xattrs()
	for _, x := range attrs {
		if s.Xattrs == nil {
			s.Xattrs = map[string]string{}
		}
		s.Xattrs[x.Name] = base64.StdEncoding.EncodeToString(x.Value)
	}
	if err := damaged("attributes", err); err != nil {
		return s, err
	}
	return s, damaged(e.Damage())
}

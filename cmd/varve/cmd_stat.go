package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
)

func newStatCommand(a *app) *cobra.Command {
	var stale bool
	cmd := &cobra.Command{
		Use:     "stat POINT:/PATH...",
		GroupID: groupRead,
		Short:   "Show all that is known of files of a recovery point",
		Args:    cobra.MinimumNArgs(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return a.stat(cmd.Context(), args, stale) },
	}
	addStaleFlag(cmd, &stale)
	return cmd
}

// statInfo is what "varve stat -o json" prints of a file.
type statInfo struct {
	fileInfo
	Point    string            `json:"point"`
	Path     string            `json:"path"`
	Inode    uint64            `json:"inode"`
	Blocks   int64             `json:"blocks"` // of 512 bytes
	Accessed time.Time         `json:"accessTime"`
	Changed  time.Time         `json:"changeTime"`
	Created  *time.Time        `json:"birthTime,omitempty"`
	Device   string            `json:"device,omitempty"`
	Xattrs   map[string]string `json:"xattrs,omitempty"` // base64
}

func (a *app) stat(ctx context.Context, args []string, stale bool) error {
	list := []statInfo{}
	err := a.eachFile(ctx, "stat", holdLate, args, stale, func(files *pointFiles, fsys diskfs.FileSystem, name string, _ bool) error {
		e, err := browse.Lstat(fsys, name)
		if err != nil {
			return files.at(err)
		}
		s, err := statOf(fsys, e)
		s.Point = files.point.Name()
		list = append(list, s)
		return err
	})
	if err != nil {
		return err
	}
	return a.print(list, func(t *table) {
		for _, s := range list {
			shown := s.Path
			if s.Target != "" {
				shown += " -> " + s.Target
			}
			t.line("File: %s", shown)
			t.line("  Mode: %s  Owner: %d:%d  Links: %d  Inode: %d", s.Mode, s.UID, s.GID, s.Links, s.Inode)
			t.line("  Size: %d bytes, %s on disk", s.Size, t.bytes(s.Blocks*512))
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
		}
	})
}

func statOf(fsys diskfs.FileSystem, e *browse.Entry) (statInfo, error) {
	st := e.Stat
	f, err := describe(fsys, e.Path, e.Info)
	if err != nil {
		return statInfo{}, err
	}
	s := statInfo{
		fileInfo: f, Path: rooted(e.Path), Inode: st.Ino, Blocks: st.Blocks,
		Accessed: st.Atime.UTC(), Changed: st.Ctime.UTC(),
	}
	if !st.Btime.IsZero() {
		b := st.Btime.UTC()
		s.Created = &b
	}
	if letter := typeLetter(st.Mode); letter == 'b' || letter == 'c' {
		s.Device = fmt.Sprintf("%d:%d", st.Major, st.Minor)
	}
	attrs, err := fsys.Xattrs(e.Path)
	if err != nil {
		return s, err //nolint:wrapcheck // names the path itself
	}
	for _, x := range attrs {
		if s.Xattrs == nil {
			s.Xattrs = map[string]string{}
		}
		s.Xattrs[x.Name] = base64.StdEncoding.EncodeToString(x.Value)
	}
	return s, nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/fusefs/diskfs"
)

func newLsCommand(a *app) *cobra.Command {
	var stale, versions bool
	cmd := &cobra.Command{
		Use:     "ls POINT[:/PATH]",
		GroupID: groupRead,
		Short:   "List files of a recovery point",
		Long: `List a directory inside a recovery point, without a mount and without root.

On a disk with partitions or logical volumes the root lists them; a path then
starts with one's name: shop/vm@latest:/p1/etc.

With --versions the argument is VOLUME:/PATH, and the states that the file had in
the volume's recovery points are listed, each with the first and the last point
that has it. Metadata is compared, and of content only what changed on the disk.`,
		Example: `  varve ls shop/db@latest:/var/lib
  varve ls shop/db@latest~2 -o json
  varve ls --versions shop/db:/etc/fstab`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if versions {
				return a.versions(cmd.Context(), args[0], stale)
			}
			return a.ls(cmd.Context(), args[0], stale)
		},
	}
	cmd.Flags().BoolVar(&versions, "versions", false, "list the states of a file across a volume's recovery points")
	addStaleFlag(cmd, &stale)
	return cmd
}

// fileInfo is what "varve ls -o json" prints of a file.
type fileInfo struct {
	Name    string    `json:"name"`
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

func (a *app) ls(ctx context.Context, arg string, stale bool) (err error) {
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	files, name, err := openFiles(ctx, repo, arg)
	if err != nil {
		return err
	}
	defer files.Close()
	fsys, inside, err := files.find(name, diskfs.Options{Stale: stale})
	if err != nil {
		return err
	}
	if fsys == nil {
		return a.lsVolumes(files)
	}
	list, err := listFiles(ctx, fsys, inside)
	if err != nil {
		return fmt.Errorf("%s: %w", files.point.Name(), err)
	}
	return a.print(list, func(t *table) {
		t.row("MODE", "LINKS", "UID", "GID", "SIZE", "MODIFIED", "NAME")
		for _, f := range list {
			shown := f.Name
			if f.Target != "" {
				shown += " -> " + f.Target
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

// listFiles lists a directory, or gives the one file that name is.
func listFiles(ctx context.Context, fsys diskfs.FileSystem, name string) ([]fileInfo, error) {
	st, err := fsys.Lstat(name)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the path itself
	}
	if st.Mode()&fs.ModeSymlink != 0 {
		if to, err := fsys.Stat(name); err == nil && to.IsDir() {
			st = to
		}
	}
	if !st.IsDir() {
		f, err := describe(fsys, name, st)
		return []fileInfo{f}, err
	}
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

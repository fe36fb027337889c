package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/files"
)

func newCatCommand(a *app) *cobra.Command {
	var stale bool
	cmd := &cobra.Command{
		Use:     "cat POINT[:/PATH]...",
		GroupID: groupRead,
		Short:   "Write files of a recovery point to standard output",
		Long: `Write files out of a recovery point to standard output, without a mount and
without root. Only what the files need is fetched.

On a disk with partitions or logical volumes the path starts with one's name:
shop/vm@latest:/p1/etc/fstab. "varve ls POINT:/" shows them. Paths may have the
wildcards *, ? and [] (quote them for the shell).

A recovery point that holds a stream has no paths: its name gives it back.`,
		Example: `  varve cat shop/db@latest:/etc/fstab
  varve cat shop/db-dump@latest | psql shop
  varve cat shop/db@2026-11-20T10:00:/var/lib/app/data.db > data.db`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.cat(cmd.Context(), args, stale) },
	}
	addStaleFlag(cmd, &stale)
	return cmd
}

func addStaleFlag(cmd *cobra.Command, stale *bool) {
	cmd.Flags().BoolVar(stale, "stale", false, "show the state on disk where the journal cannot be replayed; it may be wrong, not just old")
}

func (a *app) cat(ctx context.Context, args []string, stale bool) error {
	if done, err := a.catStreams(ctx, args); done || err != nil {
		return err
	}
	return a.eachFile(ctx, "cat", disks.AtOnce, args, stale, func(from *files.Point, fsys diskfs.FileSystem, name string, several bool, report *damageReport) error {
		err := a.catOne(ctx, from, fsys, name)
		if several && diskfs.Local(err) && !errors.Is(err, fs.ErrNotExist) {
			return report.fail(from.Name(), name, err)
		}
		return err
	})
}

func (a *app) catOne(ctx context.Context, from *files.Point, fsys diskfs.FileSystem, name string) error {
	f, err := fsys.Open(name)
	if err != nil {
		return from.Explain(err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return from.Explain(err)
	} else if !st.Mode().IsRegular() {
		return fmt.Errorf("%s:%s is %s, not a file", from.Name(), files.Rooted(name), kindOf(st.Mode()))
	}
	if _, err := io.Copy(a.stdout, contextReader{ctx, f}); err != nil {
		return fmt.Errorf("%s:%s: %w", from.Name(), files.Rooted(name), err)
	}
	return nil
}

// contextReader ends a copy when its context does.
type contextReader struct {
	ctx context.Context // of one copy
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

func kindOf(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "a directory"
	case m&fs.ModeSymlink != 0:
		return "a symbolic link"
	case m&fs.ModeDevice != 0:
		return "a device"
	case m&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case m&fs.ModeSocket != 0:
		return "a socket"
	default:
		return "no regular file"
	}
}

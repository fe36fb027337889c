package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
)

func newDiffCommand(a *app) *cobra.Command {
	var files, stale bool
	cmd := &cobra.Command{
		Use:     "diff FROM TO",
		GroupID: groupKeep,
		Short:   "List the ranges or files in which two recovery points differ",
		Long: `List the ranges that must be written onto the disk of one recovery point to get
that of another, of any two points of the repository. Only the indexes in which
they differ are read. The grain is the block size.

With -o json one object a line, {"offset":0,"length":131072,"zero":true}, and in
the end {"end":true,"count":1,"bytes":131072}: without it the list is cut.

--files lists the files that were added, removed or changed between two points of
one volume: by metadata, and by content only where the disk changed below a file.
With -o json one object a line:
{"change":"changed","path":"/etc/fstab","what":["content","time"],"from":{…},"to":{…}}.`,
		Example: `  varve diff shop/db@latest~1 shop/db@latest
  varve diff --files shop/db@latest~1 shop/db@latest`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withRepository(ctx, func(repo *repository.Repository) error {
				if files {
					return a.diffFiles(ctx, repo, args[0], args[1], stale)
				}
				if stale {
					return usagef("--stale is for --files")
				}
				return a.diff(ctx, repo, args[0], args[1])
			})
		},
	}
	cmd.Flags().BoolVar(&files, "files", false, "list files instead of ranges; both points must be of one volume")
	addStaleFlag(cmd, &stale)
	return cmd
}

// diffExtent is a line of "varve diff -o json".
type diffExtent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
	Zero   bool  `json:"zero,omitempty"`
}

// diffEnd is its last line.
type diffEnd struct {
	End   bool  `json:"end"`
	Count int64 `json:"count"`
	Bytes int64 `json:"bytes"`
}

// diffCache bounds the indexes that a diff keeps, in bytes.
const diffCache = 64 << 20

func (a *app) diff(ctx context.Context, repo *repository.Repository, from, to string) (err error) {
	pts, err := a.pointsNamed(ctx, repo, []string{from, to}, "")
	if err != nil {
		return err
	}
	held, end := a.holdPoints(ctx, repo, "diff", disks.Late, diffCache)
	defer func() { err = errors.Join(err, end()) }()
	var images [2]*image.Image
	for i, p := range pts {
		d, err := held.Hold(ctx, p)
		if err != nil {
			return fmt.Errorf("open %s: %w", p.Name(), err)
		}
		defer d.Release()
		images[i] = d.Image()
	}
	out := bufio.NewWriter(a.stdout)
	enc := json.NewEncoder(out)
	t := &table{}
	var n, bytes int64
	err = image.Diff(ctx, images[0], images[1], func(e image.Extent) error {
		n++
		bytes += e.Length
		if a.flags.output == "json" {
			return enc.Encode(diffExtent{Offset: e.Offset, Length: e.Length, Zero: e.Zero})
		}
		what := "data"
		if e.Zero {
			what = "zeroes"
		}
		_, err := fmt.Fprintf(out, "%15d %12d  %s\n", e.Offset, e.Length, what)
		return err
	})
	switch {
	case err != nil:
	case a.flags.output == "json":
		err = enc.Encode(diffEnd{End: true, Count: n, Bytes: bytes})
	default:
		_, err = fmt.Fprintf(out, "%s, %s; sizes %s and %s\n", count(int(n), "range", "ranges"), t.bytes(bytes), bytesize.Exact(pts[0].Size), bytesize.Exact(pts[1].Size))
	}
	if err != nil {
		return fmt.Errorf("diff %s %s: %w", pts[0].Name(), pts[1].Name(), err)
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	return nil
}

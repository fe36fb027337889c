package main

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
)

func newTreeCommand(a *app) *cobra.Command {
	var stale bool
	var depth int
	cmd := &cobra.Command{
		Use:     "tree POINT[:/PATH]",
		GroupID: groupRead,
		Short:   "Show the files of a recovery point as a tree",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.tree(cmd.Context(), args[0], depth, stale)
		},
	}
	cmd.Flags().IntVarP(&depth, "depth", "L", 0, "levels to show (default all)")
	addStaleFlag(cmd, &stale)
	return cmd
}

// treeNode is what "varve tree -o json" prints.
type treeNode struct {
	fileInfo
	Children []treeNode `json:"children,omitempty"`
}

func (a *app) tree(ctx context.Context, arg string, depth int, stale bool) error {
	return a.eachFile(ctx, []string{arg}, stale, func(files *pointFiles, fsys diskfs.FileSystem, name string, _ bool) error {
		if a.flags.output == "json" {
			e, err := browse.Lstat(fsys, name)
			if err != nil {
				return err //nolint:wrapcheck // names the path itself
			}
			n, err := makeTree(ctx, fsys, e, depth, browse.Visited{})
			if err != nil {
				return err
			}
			return a.print(n, nil)
		}
		out := bufio.NewWriter(a.stdout)
		fmt.Fprintln(out, quoted(files.point.Name()+":"+rooted(name)))
		dirs, others, err := drawTree(ctx, out, fsys, name, "", depth, browse.Visited{})
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "\n%d directories, %d files\n", dirs, others)
		if err := out.Flush(); err != nil {
			return fmt.Errorf("print result: %w", err)
		}
		return nil
	})
}

// maxTreeDepth bounds what a hostile image can make of a tree.
const maxTreeDepth = 1000

func makeTree(ctx context.Context, fsys diskfs.FileSystem, e *browse.Entry, depth int, visited browse.Visited) (n treeNode, err error) {
	if n.fileInfo, err = describe(fsys, e.Path, e.Info); err != nil || !e.IsDir() || depth == 1 || depth < -maxTreeDepth {
		return n, err
	}
	if err := visited.Add(fsys, e); err != nil {
		return n, err //nolint:wrapcheck // names the path itself
	}
	entries, err := fsys.ReadDir(e.Path)
	if err != nil {
		return n, err //nolint:wrapcheck // names the path itself
	}
	for _, d := range entries {
		if err := ctx.Err(); err != nil {
			return n, err //nolint:wrapcheck // cancelled
		}
		child, err := browse.Lstat(fsys, browse.Join(e.Path, d.Name()))
		if err != nil {
			return n, err //nolint:wrapcheck // names the path itself
		}
		c, err := makeTree(ctx, fsys, child, depth-1, visited)
		if err != nil {
			return n, err
		}
		n.Children = append(n.Children, c)
	}
	return n, nil
}

// drawTree draws what is below a directory; depth 0 has no bound.
func drawTree(ctx context.Context, out *bufio.Writer, fsys diskfs.FileSystem, dir, indent string, depth int, visited browse.Visited) (dirs, others int, err error) {
	self, err := browse.Lstat(fsys, dir)
	if err != nil || !self.IsDir() || len(indent) > 4*maxTreeDepth {
		return 0, 0, err //nolint:wrapcheck // names the path itself
	}
	if err := visited.Add(fsys, self); err != nil {
		return 0, 0, err //nolint:wrapcheck // names the path itself
	}
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		return 0, 0, err //nolint:wrapcheck // names the path itself
	}
	for i, e := range entries {
		if err := ctx.Err(); err != nil {
			return dirs, others, err //nolint:wrapcheck // cancelled
		}
		branch, below := "├── ", "│   "
		if i == len(entries)-1 {
			branch, below = "└── ", "    "
		}
		name, shown := browse.Join(dir, e.Name()), quoted(path.Base(e.Name()))
		if e.Type()&fs.ModeSymlink != 0 {
			if to, err := fsys.ReadLink(name); err == nil {
				shown += " -> " + quoted(strings.TrimSpace(to))
			}
		}
		fmt.Fprintln(out, indent+branch+shown)
		if !e.IsDir() {
			others++
			continue
		}
		dirs++
		if depth != 1 {
			d, o, err := drawTree(ctx, out, fsys, name, indent+below, depth-1, visited)
			if err != nil {
				return dirs, others, err
			}
			dirs, others = dirs+d, others+o
		}
	}
	return dirs, others, nil
}

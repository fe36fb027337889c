package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
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
	return a.eachFile(ctx, "tree", holdLate, []string{arg}, stale, func(files *pointFiles, fsys diskfs.FileSystem, name string, _ bool) error {
		if depth <= 0 || depth > maxTreeDepth {
			depth = maxTreeDepth
		}
		out := bufio.NewWriter(a.stdout)
		d := &treeDrawer{lister: &lister{app: a, ctx: ctx}, point: files.point.Name(), fsys: fsys, out: out, visited: browse.Visited{}}
		e, err := browse.Lstat(fsys, name)
		if err != nil {
			return files.at(err)
		}
		if a.flags.output == "json" {
			n, err := d.node(e, depth)
			if err != nil {
				return err
			}
			return errors.Join(a.print(n, nil), unreadable(d.failed))
		}
		fmt.Fprintln(out, quoted(d.point+":"+rooted(name)))
		if err := d.draw(e, "", depth); err != nil {
			return err
		}
		fmt.Fprintf(out, "\n%d directories, %d files\n", d.dirs, d.others)
		if err := out.Flush(); err != nil {
			return fmt.Errorf("print result: %w", err)
		}
		return unreadable(d.failed)
	})
}

// maxTreeDepth bounds what a hostile image can make of a tree.
const maxTreeDepth = 1000

// treeDrawer goes through a tree, past what cannot be read.
type treeDrawer struct {
	*lister
	point   string
	fsys    diskfs.FileSystem
	out     *bufio.Writer
	visited browse.Visited

	dirs, others int
}

// below visits what is in a directory, each as an entry or the error of it, if depth levels more
// than none are to be shown.
func (d *treeDrawer) below(e *browse.Entry, depth int, visit func(child *browse.Entry, name string, last bool, err error) error) error {
	if !e.IsDir() || depth == 0 {
		return nil
	}
	err := d.visited.Add(d.fsys, e)
	var entries []fs.DirEntry
	if err == nil {
		entries, err = d.fsys.ReadDir(e.Path)
	}
	if err != nil {
		if err := d.fail(d.point, e.Path, err); err != nil {
			return err
		}
	}
	for i, entry := range entries {
		if err := d.ctx.Err(); err != nil {
			return err //nolint:wrapcheck // cancelled
		}
		name := browse.Join(e.Path, entry.Name())
		child, err := browse.Lstat(d.fsys, name)
		if err != nil {
			if err := d.fail(d.point, name, err); err != nil {
				return err
			}
		}
		if err := visit(child, entry.Name(), i == len(entries)-1, err); err != nil {
			return err
		}
	}
	return nil
}

// node is the tree of JSON.
func (d *treeDrawer) node(e *browse.Entry, depth int) (n treeNode, err error) {
	if n.fileInfo, err = describe(d.fsys, e.Path, e.Info); err != nil {
		if err := d.fail(d.point, e.Path, err); err != nil {
			return n, err
		}
		n.Error = message(err)
	}
	err = d.below(e, depth, func(child *browse.Entry, name string, _ bool, err error) error {
		c := treeNode{fileInfo: fileInfo{Name: name}}
		if err != nil {
			c.Error = message(err)
		} else if c, err = d.node(child, depth-1); err != nil {
			return err
		}
		n.Children = append(n.Children, c)
		return nil
	})
	return n, err
}

// draw draws what is below a directory.
func (d *treeDrawer) draw(e *browse.Entry, indent string, depth int) error {
	return d.below(e, depth, func(child *browse.Entry, name string, last bool, err error) error {
		branch, below := "├── ", "│   "
		if last {
			branch, below = "└── ", "    "
		}
		shown := quoted(name)
		switch {
		case err != nil:
			shown += " (cannot be read)"
		case child.Info.Mode()&fs.ModeSymlink != 0:
			if to, err := d.fsys.ReadLink(child.Path); err == nil {
				shown += " -> " + quoted(strings.TrimSpace(to))
			}
		}
		fmt.Fprintln(d.out, indent+branch+shown)
		if err == nil && child.IsDir() {
			d.dirs++
			return d.draw(child, indent+below, depth-1)
		}
		d.others++
		return nil
	})
}

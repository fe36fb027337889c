package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
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

func (a *app) tree(ctx context.Context, arg string, depth int, stale bool) error {
	return a.eachFile(ctx, "tree", disks.Late, []string{arg}, stale, func(from *files.Point, fsys diskfs.FileSystem, name string, _ bool, report *damageReport) error {
		if depth <= 0 || depth > maxTreeDepth {
			depth = maxTreeDepth
		}
		d := &treeDrawer{damageReport: report, point: from.Name(), fsys: fsys, out: bufio.NewWriter(a.stdout), visited: browse.Visited{}}
		e, err := browse.Lstat(fsys, name)
		if err != nil {
			return from.Explain(err)
		}
		if a.flags.output == "json" {
			err = d.node(e, "", depth)
			fmt.Fprintln(d.out)
		} else {
			fmt.Fprintln(d.out, quoted(d.point+":"+files.Rooted(name)))
			if err = d.draw(e, "", depth); err == nil {
				fmt.Fprintf(d.out, "\n%d directories, %d files\n", d.dirs, d.others)
			}
		}
		if failed := d.out.Flush(); failed != nil {
			err = errors.Join(err, fmt.Errorf("print result: %w", failed))
		}
		return err
	})
}

// maxTreeDepth bounds the depth of a hostile image's tree.
const maxTreeDepth = 1000

// treeDrawer walks a tree and skips what cannot be read.
type treeDrawer struct {
	*damageReport
	point   string
	fsys    diskfs.FileSystem
	out     *bufio.Writer
	visited browse.Visited

	dirs, others int
}

// below visits the entries of a directory, to a depth of depth levels.
func (d *treeDrawer) below(e *browse.Entry, depth int, visit func(c browse.Child, first, last bool) error) (err error) {
	if !e.IsDir() || depth == 0 {
		return nil
	}
	if err := d.visited.Add(d.fsys, e); err != nil {
		return d.fail(d.point, e.Path, err)
	}
	dir, err := browse.ReadDir(d.ctx, e)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if err := dir.Damage(); err != nil {
		if err := d.fail(d.point, e.Path, err); err != nil {
			return err
		}
	}
	n := 0
	for c, err := range dir.All() {
		if err != nil {
			return err
		}
		if n++; c.Err != nil {
			if err := d.fail(d.point, c.Path, c.Err); err != nil {
				return err
			}
		}
		if err := visit(c, n == 1, n == dir.Len()); err != nil {
			return err
		}
	}
	return nil
}

// node prints a tree as JSON: an object as "varve ls -o json" has it, and in a non-empty
// directory "children", an array of such objects.
func (d *treeDrawer) node(e *browse.Entry, indent string, depth int) error {
	f, err := files.Describe(e)
	if err != nil {
		if err := d.fail(d.point, e.Path, err); err != nil {
			return err
		}
		f.Error = message(err)
	}
	if err := d.object(f, indent); err != nil {
		return err
	}
	some := false
	err = d.below(e, depth, func(c browse.Child, first, _ bool) error {
		if first {
			some = true
			fmt.Fprintf(d.out, ",\n%s  \"children\": [", indent)
		} else {
			fmt.Fprint(d.out, ",")
		}
		fmt.Fprintf(d.out, "\n%s    ", indent)
		if c.Err == nil {
			return d.node(c.Entry, indent+"    ", depth-1)
		}
		if err := d.object(files.Info{Name: c.Name(), Error: message(c.Err)}, indent+"    "); err != nil {
			return err
		}
		fmt.Fprintf(d.out, "\n%s    }", indent)
		return nil
	})
	if some {
		fmt.Fprintf(d.out, "\n%s  ]", indent)
	}
	fmt.Fprintf(d.out, "\n%s}", indent)
	return err
}

// object prints an object without its end.
func (d *treeDrawer) object(f files.Info, indent string) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent(indent, "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(f); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	_, err := d.out.WriteString(strings.TrimSuffix(b.String(), "\n"+indent+"}\n"))
	return err
}

// draw draws the entries below a directory.
func (d *treeDrawer) draw(e *browse.Entry, indent string, depth int) error {
	return d.below(e, depth, func(c browse.Child, _, last bool) error {
		branch, below := "├── ", "│   "
		if last {
			branch, below = "└── ", "    "
		}
		shown := quoted(c.Name())
		switch {
		case c.Err != nil:
			shown += " (cannot be read)"
		case c.Info.Mode()&fs.ModeSymlink != 0:
			to, err := c.ReadLink()
			if err != nil {
				if err := d.fail(d.point, c.Path, err); err != nil {
					return err
				}
				to = "?"
			}
			shown += " -> " + quoted(strings.TrimSpace(to))
		}
		fmt.Fprintln(d.out, indent+branch+shown)
		if c.Err == nil && c.IsDir() {
			d.dirs++
			return d.draw(c.Entry, indent+below, depth-1)
		}
		d.others++
		return nil
	})
}

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/files"
)

// errOtherVolume refuses to compare the files of different volumes.
var errOtherVolume = errors.New("the points are of different volumes: files are compared between two points of one volume ('varve diff' without --files compares any two disks)")

func (a *app) diffFiles(ctx context.Context, repo *repository.Repository, from, to string, stale bool) (err error) {
	pts, err := a.pointsNamed(ctx, repo, []string{from, to}, "")
	if err != nil {
		return err
	}
	if pts[0].Volume != pts[1].Volume {
		return fmt.Errorf("%s, %s: %w", pts[0].Name(), pts[1].Name(), errOtherVolume)
	}
	held, end := a.holdPoints(ctx, repo, "diff", disks.Late, versionCacheBytes)
	defer func() { err = errors.Join(err, end()) }()
	var opened [2]*files.Point
	for i, p := range pts {
		if opened[i], err = files.Open(ctx, held, p, a.log); err != nil {
			return err
		}
		defer opened[i].Close()
	}
	out := bufio.NewWriter(a.stdout)
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	counts := map[string]int{}
	report := &damageReport{app: a, ctx: ctx}
	err = files.Compare(ctx, opened[0], opened[1], diskfs.Options{Stale: stale}, files.Report{
		Change: func(c files.Change) error {
			counts[c.Change]++
			if a.flags.output == "json" {
				return enc.Encode(c)
			}
			_, err := fmt.Fprintln(out, changeLine(c))
			return err
		},
		Damaged: func(p *points.Point, name string, err error) error { return report.fail(p.Name(), name, err) },
	})
	if err != nil {
		return fmt.Errorf("compare %s with %s: %w", pts[1].Name(), pts[0].Name(), err)
	}
	if a.flags.output != "json" {
		fmt.Fprintf(out, "%d added, %d removed, %d changed", counts["added"], counts["removed"], counts["changed"])
		if n := counts["unknown"]; n > 0 {
			fmt.Fprintf(out, ", %d could not be compared", n)
		}
		fmt.Fprintln(out)
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	return report.err()
}

// changeLine returns a change as the table shows it.
func changeLine(c files.Change) string {
	switch c.Change {
	case "added":
		return "+ " + quoted(c.Path)
	case "removed":
		return "- " + quoted(c.Path)
	case "unknown":
		return "? " + quoted(c.Path) + "  (could not be compared)"
	}
	return "M " + quoted(c.Path) + "  (" + strings.Join(c.What, ", ") + ")"
}

package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
)

func newShowCommand(a *app) *cobra.Command {
	var group bool
	cmd := &cobra.Command{
		Use:     "show POINT",
		GroupID: groupKeep,
		Short:   "Show the details of a recovery point, or of a group",
		Example: `  varve show shop/db@latest
  varve show --group shop/vm@latest`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if group {
				return a.withRepository(ctx, func(repo *repository.Repository) error { return a.showGroup(ctx, repo, args[0]) })
			}
			return a.withRepository(ctx, func(repo *repository.Repository) error { return a.show(ctx, repo, args[0]) })
		},
	}
	addGroupFlag(cmd, &group)
	return cmd
}

// showResult is what "varve show -o json" prints.
type showResult struct {
	pointView
	Record *blocktree.Record `json:"record,omitempty"`
}

func (a *app) show(ctx context.Context, repo *repository.Repository, name string) error {
	cat, err := points.List(ctx, repo, points.ListOptions{Foreign: true})
	if err != nil {
		return err
	}
	p, err := a.names(repo, cat).Read(name)
	if err != nil {
		return err
	}
	n, err := loadNotes(ctx, repo, cat)
	if err != nil {
		return err
	}
	res := showResult{pointView: n.view(p)}
	if p.Foreign == "" {
		if res.Record, err = points.LoadRecord(ctx, repo, p); err != nil {
			return err
		}
	}
	return a.print(res, func(t *table) { writePoint(t, res, cat.ByID(p.Parent)) })
}

func writePoint(t *table, res showResult, parent *points.Point) {
	t.row("Name:", res.Name)
	t.row("ID:", res.ID)
	t.row("Cluster:", res.Cluster)
	t.row("Kind:", cmp.Or(res.Content, res.Kind))
	switch {
	case parent != nil:
		t.row("Parent:", parent.Name()+" ("+parent.ShortID()+")")
	case res.Parent != "":
		t.row("Parent:", shortID(res.Parent)+", deleted; this point does not need it")
	}
	t.row("Size:", bytesize.Exact(res.Size))
	if rec := res.Record; rec != nil {
		t.row("Generation:", rec.Generation)
		if rec.Disk != nil {
			t.row("Disk holds:", rec.Disk)
			if rec.Disk.TableID != "" {
				t.row("Partition table:", rec.Disk.TableID)
			}
			if rec.Disk.Serial != "" {
				t.row("Disk's serial:", rec.Disk.Serial)
			}
		}
		switch {
		case rec.Lineage == "":
		case rec.Lineage == rec.ID:
			t.row("Lineage:", "begins here", rec.LineageReason)
		default:
			t.row("Lineage:", shortID(rec.Lineage))
		}
		if !rec.IsStream() {
			t.row("Block size:", t.bytes(rec.BlockSize))
			t.row("Changed blocks from:", rec.Source)
		}
		for _, f := range rec.Fallbacks {
			t.row("Fallback:", f.From+" to "+f.To, f.Reason)
		}
		t.row("Taken:", t.time(rec.Start), rec.End.Sub(rec.Start).Round(time.Millisecond))
		t.row("Read:", t.bytes(rec.Stats.Read))
		if !rec.IsStream() {
			t.row("Changed:", t.bytes(rec.Stats.Changed), t.bytes(rec.Stats.Zero)+" of it zeroes")
		}
		t.row("Uploaded:", t.bytes(rec.Stats.Uploaded))
		for _, c := range []struct{ what, text string }{
			{"Change ID:", rec.ChangeID}, {"Snapshot handle:", rec.SnapshotHandle}, {"Volume handle:", rec.VolumeHandle}, {"File system:", rec.FileSystem}, {"Varve:", rec.ToolVersion},
		} {
			if c.text != "" {
				t.row(c.what, c.text)
			}
		}
		writeConsistency(t, rec)
		for _, r := range rec.ReadErrors {
			t.row("Could not be read:", r.Offset, r.End())
		}
		for _, n := range rec.Notes {
			t.row("Note:", n)
		}
	}
	if g := res.Group; g != nil {
		incomplete := ""
		if res.GroupIncomplete {
			incomplete = ", incomplete"
		}
		t.row("Group:", fmt.Sprintf("%s (%s), of %s%s", g.Name, shortID(g.ID), count(len(g.Members), "member", "members"), incomplete))
	}
	if len(res.Pins) > 0 {
		t.row("Pins:", strings.Join(res.Pins, ", "))
	}
	for _, l := range res.InUse {
		t.row("In use:", l.String())
	}
	if v := res.Verified; v != nil {
		t.row("Verified:", t.time(v.Time), res.state())
		for _, p := range v.First {
			t.row("Problem:", p)
		}
	}
	if q := res.Quarantined; q != nil {
		t.row("Quarantined:", t.time(q.Since), q.Reason)
	}
}

// writeConsistency shows how the moment of the point was made.
func writeConsistency(t *table, rec *blocktree.Record) {
	c := rec.Consistency
	switch {
	case rec.NotCrashConsistent && (c == nil || c.Detail == "" && len(c.Holds) == 0):
		t.row("Consistency:", "none: the disk was written to while it was read")
		return
	case c == nil:
		return
	}
	text := c.Level
	if c.Method != "" {
		text += ", by " + c.Method
	}
	if c.OneMoment {
		text += ", one moment for the whole group"
	}
	t.row("Consistency:", text, c.Detail)
	for _, h := range c.Holds {
		proof := "proven to last beyond the moment"
		if !h.Proven {
			proof = "not proven to last beyond the moment"
		}
		held := ""
		if h.Duration > 0 {
			held = " for " + h.Duration.Round(time.Millisecond).String()
		}
		if h.Target != "" {
			held = " in " + h.Target + held
		}
		t.row("Held:", h.Name+held+", "+proof, h.Detail)
	}
}

package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

func newShowCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "show POINT",
		GroupID: groupKeep,
		Short:   "Show all that is known of a recovery point",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withRepository(ctx, func(repo *repository.Repository) error { return a.show(ctx, repo, args[0]) })
		},
	}
}

// showResult is what "varve show -o json" prints.
type showResult struct {
	pointView
	Record *blocktree.Record `json:"record,omitempty"`
}

func (a *app) show(ctx context.Context, repo *repository.Repository, name string) error {
	cat, err := backup.List(ctx, repo, backup.ListOptions{Foreign: true})
	if err != nil {
		return err
	}
	p, err := a.names(repo, cat).Read(name)
	if err != nil {
		return err
	}
	n, err := loadNotes(ctx, repo)
	if err != nil {
		return err
	}
	res := showResult{pointView: n.view(p)}
	if p.Foreign == "" {
		if res.Record, err = backup.LoadRecord(ctx, repo, p); err != nil {
			return err
		}
	}
	return a.print(res, func(t *table) { writePoint(t, res, cat.ByID(p.Parent)) })
}

func writePoint(t *table, res showResult, parent *backup.Point) {
	t.row("Name:", res.Name)
	t.row("ID:", res.ID)
	t.row("Cluster:", res.Cluster)
	t.row("Kind:", res.Kind)
	switch {
	case parent != nil:
		t.row("Parent:", parent.Name()+" ("+parent.ShortID()+")")
	case res.Parent != "":
		t.row("Parent:", shortID(res.Parent)+", deleted; nothing of it is missed")
	}
	t.row("Size:", t.bytes(res.Size), res.Size)
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
		t.row("Block size:", t.bytes(rec.BlockSize))
		t.row("Changed blocks from:", rec.Source)
		for _, f := range rec.Fallbacks {
			t.row("Fallback:", f.From+" to "+f.To, f.Reason)
		}
		t.row("Taken:", t.time(rec.Start), rec.End.Sub(rec.Start).Round(time.Millisecond))
		t.row("Read:", t.bytes(rec.Stats.Read))
		t.row("Changed:", t.bytes(rec.Stats.Changed), t.bytes(rec.Stats.Zero)+" of it zeroes")
		t.row("Uploaded:", t.bytes(rec.Stats.Uploaded))
		for _, c := range []struct{ what, text string }{
			{"Change ID:", rec.ChangeID}, {"Snapshot handle:", rec.SnapshotHandle}, {"Volume handle:", rec.VolumeHandle}, {"File system:", rec.FileSystem}, {"Varve:", rec.ToolVersion},
		} {
			if c.text != "" {
				t.row(c.what, c.text)
			}
		}
		if rec.NotCrashConsistent {
			t.row("Consistency:", "none: the disk was written to while it was read")
		}
		for _, r := range rec.ReadErrors {
			t.row("Could not be read:", r.Offset, r.Offset+r.Length)
		}
		for _, n := range rec.Notes {
			t.row("Note:", n)
		}
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

package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/progress"
)

func newRepoRepairCommand(a *app) *cobra.Command {
	var opt backup.RepairOptions
	cmd := &cobra.Command{
		Use:   "repair",
		Short: "Rebuild the repository's index from its packs",
		Long: `Rebuild the repository's index from its packs. Each pack carries an index of its
own, so what a lost or damaged index blob listed can be found again: recovery
points that vanished from the list, and blocks that points miss.

Without --apply the command only shows what it would bring back and what is lost.
The exit code is 4 where something stays lost. Points that were deleted on purpose
stay deleted. Backups and maintenance may run at the same time.

If blobs can be put back from a copy of the storage, do that first.

--accept-loss gives up what cannot be found: it is not reported again, and
maintenance, which reclaims nothing while a part of the list of points is
unreadable, continues. Damaged points stay; delete them with "varve forget", or heal
them with "varve verify --read 100% --quarantine" and a full backup.`,
		Example: `  varve repo repair
  varve repo repair --apply
  varve verify --read 5%`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opt.AcceptLoss && !opt.Apply {
				return usagef("--accept-loss changes the repository: give --apply, too")
			}
			return a.repair(cmd.Context(), opt)
		},
	}
	cmd.Flags().BoolVar(&opt.Apply, "apply", false, "write the rebuilt index; without it nothing is changed")
	cmd.Flags().BoolVar(&opt.AcceptLoss, "accept-loss", false, "give up what is lost for good, so that it is not reported again")
	return cmd
}

// repairResult is what "varve repo repair -o json" prints.
type repairResult struct {
	Applied        bool                             `json:"applied"`
	DamagedIndexes []string                         `json:"damagedIndexBlobs,omitempty"`
	Recovered      []repository.UnknownPack         `json:"recoveredPacks,omitempty"`
	Back           []repairPoint                    `json:"pointsBack,omitempty"`
	Deleted        []repairPoint                    `json:"pointsDeletedBefore,omitempty"`
	Points         int                              `json:"points"`
	Damaged        []verifyPoint                    `json:"damagedPoints,omitempty"`
	Missing        []backup.MissingPoint            `json:"missingPoints,omitempty"`
	Unreadable     []repository.UnreadableManifests `json:"unreadableManifests,omitempty"`
	Undecodable    []repository.UnknownPack         `json:"undecodablePacks,omitempty"`
	LossAccepted   bool                             `json:"lossAccepted"`
}

type repairPoint struct {
	Name string `json:"name"`
	ID   string `json:"id"`
}

func (a *app) repair(ctx context.Context, opt backup.RepairOptions) error {
	repo, err := a.openRepositoryBy(ctx, repository.OpenForRepair)
	if err != nil {
		return err
	}
	task := a.progress.Start("repair", 0, progress.Count)
	opt.Progress = func(p backup.Progress) {
		task.SetTotal(p.Total)
		task.Set(p.Done)
	}
	rep, err := backup.Repair(ctx, repo, opt)
	task.Done()
	if err == nil {
		res := repairResultOf(rep)
		err = errors.Join(a.print(res, func(t *table) { writeRepair(t, res, rep.Nothing()) }), rep.Err())
	}
	return errors.Join(err, repo.Close(context.WithoutCancel(ctx)))
}

func repairResultOf(rep *backup.RepairReport) repairResult {
	res := repairResult{
		Applied: rep.Applied, DamagedIndexes: rep.DamagedIndexes, Recovered: rep.Recovered, Points: len(rep.Points),
		Back: repairPoints(rep.Back), Deleted: repairPoints(rep.Deleted),
		Missing: rep.Missing, Unreadable: rep.Unreadable, Undecodable: rep.Undecodable, LossAccepted: rep.Accepted,
	}
	for _, p := range rep.Points {
		if len(p.Problems) > 0 {
			res.Damaged = append(res.Damaged, verifyPointOf(p))
		}
	}
	return res
}

func repairPoints(list []*points.Point) []repairPoint {
	var out []repairPoint
	for _, p := range list {
		out = append(out, repairPoint{Name: p.FullName(), ID: p.ID})
	}
	return out
}

func writeRepair(t *table, res repairResult, nothing bool) {
	if nothing {
		t.line("Nothing to repair: the index knows every pack, and nothing is missing from %s.", count(res.Points, "recovery point", "recovery points"))
		return
	}
	brought, deleted := "would be listed again", "would be deleted"
	if res.Applied {
		brought, deleted = "is listed again", "was deleted"
	}
	for _, id := range res.DamagedIndexes {
		t.line("index blob %s cannot be decoded and %s", id, deleted)
	}
	if n := len(res.Recovered); n > 0 {
		var bytes int64
		contents := 0
		for _, u := range res.Recovered {
			bytes += u.Bytes
			contents += u.Contents
		}
		t.line("found in %s (%s): %s that no index knows", count(n, "pack", "packs"), t.bytes(bytes), count(contents, "content", "contents"))
	}
	for _, p := range res.Back {
		t.line("%s (ID %s) %s", p.Name, shortID(p.ID), brought)
	}
	for _, p := range res.Deleted {
		t.line("%s (ID %s) was deleted on purpose and stays so", p.Name, shortID(p.ID))
	}
	writeLoss(t, res)
	t.line("%s, %d damaged", count(res.Points, "recovery point", "recovery points"), len(res.Damaged))
	switch {
	case res.Applied:
		t.line("The index was rebuilt. Next: varve verify --read 100%%")
	case len(res.Recovered)+len(res.DamagedIndexes) > 0:
		t.line("Nothing was changed. To write the rebuilt index: varve repo repair --apply")
	default:
		t.line("Nothing was changed. To give up what is lost: varve repo repair --apply --accept-loss")
	}
}

// writeLoss lists what remains lost.
func writeLoss(t *table, res repairResult) {
	for i, m := range res.Missing {
		if i == shownProblems {
			t.line("lost: %d more points", len(res.Missing)-i)
			break
		}
		t.line("lost: %v, and no pack lists it", m)
	}
	for _, u := range res.Unreadable {
		t.line("lost: pack %s, with a part of the list of recovery points: %s", u.Pack, u.Reason)
	}
	for _, u := range res.Undecodable {
		t.line("lost: pack %s (%s) cannot be decoded: %s", u.Pack, t.bytes(u.Bytes), u.Reason)
	}
	for _, p := range res.Damaged {
		t.line("%s (ID %s) is damaged:", p.Name, shortID(p.ID))
		writeProblems(t, p.Problems)
	}
}

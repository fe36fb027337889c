package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/progress"
)

func newVerifyCommand(a *app) *cobra.Command {
	var read, volume string
	var quarantine, group bool
	cmd := &cobra.Command{
		Use:     "verify [POINT...]",
		GroupID: groupKeep,
		Short:   "Prove that recovery points can be restored",
		Long: `Prove that recovery points can be restored: that every index can be read and
keeps the rules of the format, that every block is in the repository's index and
its pack in storage, and, with --read, that the bytes are those backed up.

What points share is checked once, so verifying a chain costs its unique
blocks. Damage is named by point, offset, object and pack, and the exit code is 4.
Intact parts of a damaged point, and all other points, stay readable. Damage that
a read found is reported until the data is read in full again.

Results are kept in the repository for "varve list". Where they cannot be written
(storage that is full or read-only) they are only printed, and the exit code is
the same: 0 with a warning if nothing is damaged.

With --group the names are of groups: all their points are verified, and a group
that lacks a point fails with exit code 4. Without names incomplete groups are only
listed.

With --quarantine no later backup builds on a damaged point, and damaged blocks
are marked: the next backup that has the same data stores them again, which
repairs older points. A point that is whole again is released.`,
		Example: `  varve verify
  varve verify --read 5%
  varve verify shop/db@latest --read 100% --quarantine`,
		RunE: func(cmd *cobra.Command, args []string) error {
			share, err := parseShare(read)
			if err != nil {
				return usagef("--read: %w", err)
			}
			if group && (len(args) == 0 || volume != "") {
				return usagef("--group needs the names of groups, and no --volume")
			}
			ctx := cmd.Context()
			fromStorage := func(ctx context.Context, opt repository.OpenOptions) (*repository.Repository, error) {
				opt.FromStorage = true
				return repository.Open(ctx, opt)
			}
			return a.withRepositoryBy(ctx, fromStorage, func(repo *repository.Repository) error {
				if group {
					return a.verifyGroups(ctx, repo, args, backup.VerifyOptions{Read: share, Quarantine: quarantine})
				}
				return a.verify(ctx, repo, args, volume, backup.VerifyOptions{Read: share, Quarantine: quarantine})
			})
		},
	}
	cmd.Flags().StringVar(&read, "read", "0%", "share of the blocks to read and compare with what was backed up; it is the chance of each block")
	cmd.Flags().StringVar(&volume, "volume", "", "all points of this volume, namespace/name")
	addGroupFlag(cmd, &group)
	cmd.Flags().BoolVar(&quarantine, "quarantine", false, "mark damaged points, and have damaged blocks stored again")
	return cmd
}

// verifyResult is what "varve verify -o json" prints.
type verifyResult struct {
	Points    []verifyPoint `json:"points"`
	Blocks    int64         `json:"blocks"`
	Read      int64         `json:"blocksRead"`
	Bytes     int64         `json:"bytesRead"`
	Indexes   int64         `json:"indexes"`
	Forgotten int           `json:"markedForStoringAgain"`

	Unreadable []repository.UnreadableManifests `json:"unreadableManifests,omitempty"`
	Unknown    []repository.UnknownPack         `json:"unknownPacks,omitempty"`
	Missing    []backup.MissingPoint            `json:"missingPoints,omitempty"`
	Deleted    []string                         `json:"deletedPoints,omitempty"`
	Incomplete []incompleteGroup                `json:"incompleteGroups,omitempty"`
}

// incompleteGroup is a group with missing points.
type incompleteGroup struct {
	Name    string   `json:"name"`
	ID      string   `json:"id"`
	Missing []string `json:"missing"` // volumes
}

type verifyPoint struct {
	Name     string          `json:"name"`
	ID       string          `json:"id"`
	OK       bool            `json:"ok"`
	Released bool            `json:"released,omitempty"`
	Problems []verifyProblem `json:"problems,omitempty"`
}

type verifyProblem struct {
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Object string `json:"object,omitempty"`
	Error  string `json:"error"`
}

func (a *app) verify(ctx context.Context, repo *repository.Repository, names []string, volume string, opt backup.VerifyOptions) error {
	var err error
	if opt.Points, err = a.pointsNamed(ctx, repo, names, volume); err != nil {
		return err
	}
	return a.runVerify(ctx, repo, opt)
}

func (a *app) verifyGroups(ctx context.Context, repo *repository.Repository, names []string, opt backup.VerifyOptions) error {
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return err
	}
	for _, name := range names {
		g, err := a.names(repo, cat).ReadGroup(name)
		if err != nil {
			return err
		}
		opt.Groups = append(opt.Groups, g)
	}
	return a.runVerify(ctx, repo, opt)
}

func (a *app) runVerify(ctx context.Context, repo *repository.Repository, opt backup.VerifyOptions) error {
	task := a.progress.Start("verify", 0, progress.Count)
	opt.Progress = func(p backup.Progress) {
		task.SetTotal(p.Total)
		task.Set(p.Done)
	}
	rep, err := backup.Verify(ctx, repo, opt)
	task.Done()
	answered := errors.Is(err, points.ErrDamaged) || errors.Is(err, backup.ErrIncompleteGroup)
	if rep == nil || (err != nil && !answered && !errors.Is(err, backup.ErrNotKept)) {
		return err
	}
	if errors.Is(err, backup.ErrNotKept) && !answered && ctx.Err() == nil {
		// Verify checks whether the points can be restored, and they can.
		a.log.Warn("nothing is damaged, but \"varve list\" will not show this run, and quarantined points stay quarantined", "error", err)
		err = nil
	}
	res := verifyResult{Blocks: rep.Blocks, Read: rep.Read, Bytes: rep.Bytes, Indexes: rep.Segments, Forgotten: rep.Forgotten, Points: []verifyPoint{}, Unreadable: rep.Unreadable, Unknown: rep.Unknown, Missing: rep.Missing}
	for _, p := range rep.Points {
		res.Points = append(res.Points, verifyPointOf(p))
	}
	for _, p := range rep.Deleted {
		res.Deleted = append(res.Deleted, p.Name())
	}
	for _, g := range rep.Incomplete {
		missing := incompleteGroup{Name: g.NameIn(a.clusterOf(repo)), ID: g.ID}
		for _, v := range g.Missing {
			missing.Missing = append(missing.Missing, v.String())
		}
		res.Incomplete = append(res.Incomplete, missing)
	}
	perr := a.print(res, func(t *table) { writeVerify(t, res) })
	return errors.Join(err, perr)
}

// shownProblems bounds the problems that a table shows of one point; JSON has all.
const shownProblems = 10

func writeVerify(t *table, res verifyResult) {
	bad := 0
	for _, p := range res.Points {
		if p.Released {
			t.line("%s is whole again and no longer quarantined", p.Name)
		}
		if p.OK {
			continue
		}
		bad++
		t.line("%s (ID %s) is damaged:", p.Name, shortID(p.ID))
		writeProblems(t, p.Problems)
	}
	for _, name := range res.Deleted {
		t.line("%s was deleted during the verify", name)
	}
	for _, m := range res.Missing {
		t.line("%v", m)
	}
	for _, g := range res.Incomplete {
		t.line("group %s (ID %s) is incomplete: no point of %s", g.Name, shortID(g.ID), strings.Join(g.Missing, ", "))
	}
	for i, u := range res.Unknown {
		if i == shownProblems {
			t.line("and %d more packs in no index", len(res.Unknown)-i)
			break
		}
		t.line("pack %s (%s) is in no index: the index blob that listed it is lost%s", u.Pack, t.bytes(u.Bytes), unneeded(u, bad))
	}
	for _, u := range res.Unreadable {
		t.line("pack %s cannot be read: recovery points that it lists are missing here: %s", u.Pack, u.Reason)
	}
	t.line("%s, %d damaged: %d blocks looked up, %d of them read (%s)",
		count(len(res.Points), "recovery point", "recovery points"), bad, res.Blocks, res.Read, t.bytes(res.Bytes))
	if res.Forgotten > 0 {
		t.line("%s will be stored again by the next backup that has the same data", count(res.Forgotten, "damaged block", "damaged blocks"))
	} else if bad > 0 {
		t.line("Next: varve verify --read 100%% --quarantine, then a full backup of the volume while it still has the data.")
	}
}

// unneeded completes the line about a pack that is in no index: no point needs it.
func unneeded(u repository.UnknownPack, damaged int) string {
	if damaged > 0 || u.MayListPoints() {
		return ""
	}
	return ", and no recovery point needs it"
}

func verifyPointOf(p backup.PointResult) verifyPoint {
	vp := verifyPoint{Name: p.Point.Name(), ID: p.Point.ID, OK: len(p.Problems) == 0, Released: p.Lifted}
	for _, pr := range p.Problems {
		v := verifyProblem{Offset: pr.Offset, Length: pr.Length, Error: pr.Err.Error()}
		if pr.Object != (repository.ObjectID{}) {
			v.Object = pr.Object.String()
		}
		vp.Problems = append(vp.Problems, v)
	}
	return vp
}

// writeProblems shows the damage of a point. Adjoining ranges with the same cause are merged.
func writeProblems(t *table, problems []verifyProblem) {
	ranges := joinProblems(problems)
	for i, r := range ranges {
		if i == shownProblems {
			t.line("  and %d more", len(ranges)-i)
			return
		}
		more := ""
		if r.objects > 1 {
			more = fmt.Sprintf(" (and %d more)", r.objects-1)
		}
		t.line("  bytes %d to %d: %s%s", r.Offset, r.Offset+r.Length, r.Error, more)
	}
}

// problemRange is the damage of some adjoining objects.
type problemRange struct {
	verifyProblem // of the first, but for the length

	objects int
}

// blobNames matches the names of contents and packs in an error.
var blobNames = regexp.MustCompile(`\b[a-z]*[0-9a-f]{16,}(-s[0-9a-f]+)?|\b\d+\b`)

func joinProblems(problems []verifyProblem) []problemRange {
	var out []problemRange
	cause := func(p verifyProblem) string { return blobNames.ReplaceAllString(p.Error, "") }
	for _, p := range problems {
		if n := len(out) - 1; n >= 0 && out[n].Offset+out[n].Length == p.Offset && cause(out[n].verifyProblem) == cause(p) {
			out[n].Length += p.Length
			out[n].objects++
			continue
		}
		out = append(out, problemRange{p, 1})
	}
	return out
}

// pointsNamed resolves names, and adds all points of a volume; without either it returns nil.
func (a *app) pointsNamed(ctx context.Context, repo *repository.Repository, names []string, volume string) ([]*points.Point, error) {
	if len(names) == 0 && volume == "" {
		return nil, nil
	}
	cat, err := points.List(ctx, repo, points.ListOptions{Foreign: len(names) > 0})
	if err != nil {
		return nil, err
	}
	rule := a.names(repo, cat)
	var out []*points.Point
	for _, name := range names {
		p, err := rule.Read(name)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	if volume != "" {
		v, err := volumeNamed(rule, volume)
		if err != nil {
			return nil, err
		}
		of := cat.Of(v)
		if len(of) == 0 {
			return nil, rule.NoPoints(v)
		}
		out = append(out, of...)
	}
	return out, nil
}

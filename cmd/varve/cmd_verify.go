package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/progress"
)

func newVerifyCommand(a *app) *cobra.Command {
	var read, volume string
	var quarantine bool
	cmd := &cobra.Command{
		Use:     "verify [POINT...]",
		GroupID: groupKeep,
		Short:   "Prove that recovery points can be restored",
		Long: `Prove that recovery points can be restored: that every index can be read and
keeps the rules of the format, that every block is in the repository's index and
its pack in storage, and, with --read, that the bytes are those backed up.

What points share is looked at once, so verifying a chain costs its unique
blocks. Damage is named by point, offset, object and pack, and the exit code is 4.
Intact parts of a damaged point, and all other points, stay readable. What was
found damaged by reading it stays so until it is read in full again.

Results are kept in the repository for "varve list". Where they cannot be written
(storage that is full or read-only) they are printed all the same, and the exit
code is that of what was found: 0 with a warning if nothing is damaged.

With --quarantine no later backup builds on a damaged point, and the damaged
blocks are marked so that the next backup that meets the same bytes stores them
again, which heals older points. A point that is whole again is released.`,
		Example: `  varve verify
  varve verify --read 5%
  varve verify shop/db@latest --read 100% --quarantine`,
		RunE: func(cmd *cobra.Command, args []string) error {
			share, err := parseShare(read)
			if err != nil {
				return usagef("--read: %w", err)
			}
			ctx := cmd.Context()
			return a.withRepository(ctx, func(repo *repository.Repository) error {
				return a.verify(ctx, repo, args, volume, backup.VerifyOptions{Read: share, Quarantine: quarantine})
			})
		},
	}
	cmd.Flags().StringVar(&read, "read", "0%", "share of the blocks to read and compare with what was backed up: the chance of each, so of few blocks perhaps none is")
	cmd.Flags().StringVar(&volume, "volume", "", "all points of this volume, namespace/name")
	cmd.Flags().BoolVar(&quarantine, "quarantine", false, "mark damaged points and have damaged blocks stored again")
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
	task := a.progress.Start("verify", 0, progress.Count)
	opt.Progress = func(p backup.Progress) {
		task.SetTotal(p.Total)
		task.Set(p.Done)
	}
	rep, err := backup.Verify(ctx, repo, opt)
	task.Done()
	if rep == nil || (err != nil && !errors.Is(err, backup.ErrDamaged) && !errors.Is(err, backup.ErrNotKept)) {
		return err
	}
	if errors.Is(err, backup.ErrNotKept) && !errors.Is(err, backup.ErrDamaged) && ctx.Err() == nil {
		// The question was whether the points can be restored, and they can.
		a.log.Warn("nothing is damaged, but \"varve list\" will not show this run, and points that were quarantined stay so", "error", err)
		err = nil
	}
	res := verifyResult{Blocks: rep.Blocks, Read: rep.Read, Bytes: rep.Bytes, Indexes: rep.Segments, Forgotten: rep.Forgotten, Points: []verifyPoint{}, Unreadable: rep.Unreadable}
	for _, p := range rep.Points {
		vp := verifyPoint{Name: p.Point.Name(), ID: p.Point.ID, OK: len(p.Problems) == 0, Released: p.Lifted}
		for _, pr := range p.Problems {
			v := verifyProblem{Offset: pr.Offset, Length: pr.Length, Error: pr.Err.Error()}
			if pr.Object != (repository.ObjectID{}) {
				v.Object = pr.Object.String()
			}
			vp.Problems = append(vp.Problems, v)
		}
		res.Points = append(res.Points, vp)
	}
	perr := a.print(res, func(t *table) { writeVerify(t, res) })
	return errors.Join(err, perr)
}

// shownProblems bounds what a table shows of one point; JSON has all.
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
		for i, pr := range p.Problems {
			if i == shownProblems {
				t.line("  and %d more", len(p.Problems)-i)
				break
			}
			t.line("  bytes %d to %d: %s", pr.Offset, pr.Offset+pr.Length, pr.Error)
		}
	}
	for _, u := range res.Unreadable {
		t.line("pack %s cannot be read: recovery points that it lists are missing here: %s", u.Pack, u.Reason)
	}
	t.line("%s, %d damaged: %d blocks looked up, %d of them read (%s)",
		count(len(res.Points), "recovery point", "recovery points"), bad, res.Blocks, res.Read, t.bytes(res.Bytes))
	if res.Forgotten > 0 {
		t.line("%s will be stored again by the next backup that meets the same bytes", count(res.Forgotten, "damaged block", "damaged blocks"))
	} else if bad > 0 {
		t.line("Next: varve verify --read 100%% --quarantine, then a full backup of the volume while it still has those bytes.")
	}
}

// pointsNamed resolves names, and adds all points of a volume; without either
// it returns nil.
func (a *app) pointsNamed(ctx context.Context, repo *repository.Repository, names []string, volume string) ([]*backup.Point, error) {
	if len(names) == 0 && volume == "" {
		return nil, nil
	}
	cat, err := backup.List(ctx, repo, backup.ListOptions{Foreign: len(names) > 0})
	if err != nil {
		return nil, err
	}
	rule := a.names(repo, cat)
	var out []*backup.Point
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

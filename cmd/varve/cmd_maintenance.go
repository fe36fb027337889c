package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

func newMaintenanceCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "maintenance",
		GroupID: groupKeep,
		Short:   "Reclaim space and keep the repository's index small",
		Long: `Maintenance reclaims what no recovery point reaches, and keeps the repository's
index small. It runs by itself, when due, after backups and prunes of the client
that owns it; every Varve client is that owner unless stock Kopia took it over.`,
	}
	cmd.AddCommand(newMaintenanceRunCommand(a), newMaintenanceStatusCommand(a))
	return cmd
}

func newMaintenanceRunCommand(a *app) *cobra.Command {
	var full, quick, force bool
	var safety string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run maintenance that is due, or now with --full or --quick",
		Long: `Run maintenance: what is due, unless --full or --quick is given.

With safety margins, unreferenced data is deleted after two days, in two runs, so
that a backup that is just reusing it loses nothing. --safety=none deletes at
once: it is safe with backups by Varve, but other Kopia clients must not be
writing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			opt := backup.MaintainOptions{Mode: repository.MaintenanceAuto, Force: force}
			switch {
			case full && quick:
				return usagef("--full and --quick exclude each other")
			case full:
				opt.Mode = repository.MaintenanceFull
			case quick:
				opt.Mode = repository.MaintenanceQuick
			}
			switch safety {
			case "full":
			case "none":
				opt.NoSafety = true
			default:
				return usagef("--safety is full or none, not %q", safety)
			}
			ctx := cmd.Context()
			return a.withRepository(ctx, func(repo *repository.Repository) error { return a.maintain(ctx, repo, opt) })
		},
	}
	cmd.Flags().BoolVar(&full, "full", false, "run the full cycle now")
	cmd.Flags().BoolVar(&quick, "quick", false, "run the quick cycle now")
	cmd.Flags().BoolVar(&force, "force", false, "run even if another client owns maintenance")
	cmd.Flags().StringVar(&safety, "safety", "full", "full, or none to reclaim at once")
	return cmd
}

// maintenanceResult is what "varve maintenance run -o json" prints.
type maintenanceResult struct {
	Mode        string              `json:"mode"` // empty when nothing was due
	Busy        bool                `json:"busy"`
	Seconds     float64             `json:"seconds"`
	Snapshots   int                 `json:"snapshots"`
	InUse       repository.Amount   `json:"inUse"`
	Unused      repository.Amount   `json:"markedDeleted"`
	TooRecent   repository.Amount   `json:"tooRecent"`
	Recovered   repository.Amount   `json:"recovered"`
	Lost        repository.Amount   `json:"lost"`
	Rewritten   repository.Amount   `json:"rewritten"`
	NotMoved    repository.Amount   `json:"unreadable"`
	Reclaimed   repository.Amount   `json:"reclaimed"`
	Temporary   repository.Amount   `json:"temporary"`
	Killed      repository.Amount   `json:"killedWrites"`
	Leases      int                 `json:"expiredLeases"`
	DeadRuns    int                 `json:"killedBackupsCleared"`
	Quarantined []points.Quarantine `json:"quarantined,omitempty"`
	Held        repository.Amount   `json:"held"`

	Unreadable []repository.UnreadableManifests `json:"unreadableManifests,omitempty"`
	Unknown    []repository.UnknownPack         `json:"unknownPacks,omitempty"`
}

func (a *app) maintain(ctx context.Context, repo *repository.Repository, opt backup.MaintainOptions) error {
	rep, err := backup.Maintain(ctx, repo, opt)
	if err != nil {
		return err
	}
	res := maintenanceResult{
		Mode: string(rep.Mode), Busy: rep.Busy, Seconds: rep.End.Sub(rep.Start).Seconds(), Snapshots: rep.Snapshots,
		InUse: rep.InUse, Unused: rep.Unused, TooRecent: rep.TooRecent, Recovered: rep.Recovered, Lost: rep.Lost,
		Rewritten: rep.Rewritten, NotMoved: rep.NotMoved, Reclaimed: rep.Reclaimed, Temporary: rep.Temporary,
		Leases: rep.ExpiredLeases, DeadRuns: rep.DeadRuns, Quarantined: rep.Quarantined,
		Held: rep.Held, Unreadable: rep.Unreadable, Unknown: rep.Unknown,
	}
	if rep.Killed != nil {
		res.Killed = rep.Killed.Packs
	}
	if res.Mode == "" && !res.Busy {
		if st, err := repo.MaintenanceState(ctx); err == nil && !st.Owned {
			return a.print(res, func(t *table) {
				t.line("Nothing was done: maintenance belongs to %s. Run it there, or here with --force.", st.Owner)
			})
		}
	}
	if err := a.print(res, func(t *table) { writeMaintenance(t, res) }); err != nil {
		return err
	}
	if len(res.Unreadable) > 0 {
		return fmt.Errorf("%w: maintenance reclaimed nothing, since pack %s, which holds a part of the list of recovery points, cannot be read: "+
			"put it back from a copy of the storage, or run \"varve repo repair\"", points.ErrDamaged, res.Unreadable[0].Pack)
	}
	if rep.Withheld {
		return fmt.Errorf("%w: maintenance reclaimed nothing, since no index knows pack %s (%s): "+
			"put the lost index blob back from a copy of the storage, or run \"varve repo repair\"",
			points.ErrDamaged, res.Unknown[0].Pack, count(len(res.Unknown), "such pack", "such packs"))
	}
	if n := res.Lost.Count + res.NotMoved.Count; n > 0 {
		return fmt.Errorf("%w: maintenance ran, but %s of recovery points cannot be read: "+
			"\"varve verify --read 100%% --quarantine\" names the points", points.ErrDamaged, count(int(n), "block or index", "blocks and indexes"))
	}
	return nil
}

func writeMaintenance(t *table, res maintenanceResult) {
	switch {
	case res.Busy:
		t.line("Maintenance is running on another machine; nothing was done.")
		return
	case res.Mode == "":
		t.line("Nothing is due. See: varve maintenance status")
		return
	case res.Mode == string(repository.MaintenanceQuick):
		t.line("quick maintenance done in %.1f s", res.Seconds)
		return
	}
	t.line("full maintenance done in %.1f s", res.Seconds)
	for _, row := range []struct {
		what string
		a    repository.Amount
	}{
		{"in use", res.InUse}, {"marked deleted", res.Unused}, {"unused, but too recent", res.TooRecent},
		{"perhaps unused, but kept", res.Held},
		{"packs of killed writes", res.Killed}, {"taken back", res.Recovered}, {"moved to new packs", res.Rewritten}, {"packs deleted", res.Reclaimed},
		{"left by killed writes", res.Temporary}, {"in use, but lost", res.Lost}, {"unreadable", res.NotMoved},
	} {
		if row.a.Count > 0 {
			t.row("  "+row.what, row.a.Count, t.bytes(row.a.Bytes))
		}
	}
	if res.DeadRuns > 0 {
		t.line("  cleared what %s left", count(res.DeadRuns, "killed backup", "killed backups"))
	}
	for _, q := range res.Quarantined {
		t.line("  quarantined %s: %s", q.Name, q.Reason)
	}
}

func newMaintenanceStatusCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show who owns maintenance, when it ran and when it is due",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			return a.withRepository(ctx, func(repo *repository.Repository) error { return a.maintenanceStatus(ctx, repo) })
		},
	}
}

// maintenanceStatus is what "varve maintenance status -o json" prints.
type maintenanceStatus struct {
	Owner      string      `json:"owner"`
	OwnedHere  bool        `json:"ownedByThisClient"`
	Quick      cycleStatus `json:"quick"`
	Full       cycleStatus `json:"full"`
	Reclaimed  int64       `json:"reclaimedBytes"` // by the recorded runs
	IndexBlobs int         `json:"indexBlobs"`
}

type cycleStatus struct {
	Last    time.Time `json:"last,omitzero"`
	Error   string    `json:"error,omitempty"`
	Next    time.Time `json:"next,omitzero"`
	Overdue bool      `json:"overdue"`
}

func (a *app) maintenanceStatus(ctx context.Context, repo *repository.Repository) error {
	st, err := repo.MaintenanceState(ctx)
	if err != nil {
		return err
	}
	now := repo.Now()
	cycle := func(run repository.MaintenanceRun, next time.Time) cycleStatus {
		c := cycleStatus{Last: run.End, Error: run.Err, Next: next}
		if next.Year() <= 1970 {
			c.Next = time.Time{}
		}
		c.Overdue = !next.IsZero() && now.After(next)
		return c
	}
	res := maintenanceStatus{
		Owner: st.Owner, OwnedHere: st.Owned, Reclaimed: st.Reclaimed, IndexBlobs: st.Indexes,
		Quick: cycle(st.LastQuick, st.NextQuick), Full: cycle(st.LastFull, st.NextFull),
	}
	return a.print(res, func(t *table) {
		owner := res.Owner
		if res.OwnedHere {
			owner += " (this client)"
		}
		t.row("Owner:", owner)
		for _, c := range []struct {
			name string
			cycleStatus
		}{{"Quick", res.Quick}, {"Full", res.Full}} {
			t.row(c.name+" last ran:", t.time(c.Last), c.Error)
			due := t.time(c.Next)
			if c.Overdue {
				due += " (due now)"
			}
			t.row(c.name+" next due:", due)
		}
		t.row("Reclaimed:", t.bytes(res.Reclaimed))
		t.row("Index blobs:", res.IndexBlobs)
	})
}

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

func newRepoStatusCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the connected repository: storage, format, maintenance",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rep, err := a.openRepository(cmd.Context())
			if err != nil {
				return err
			}
			return a.showStatus(cmd.Context(), rep)
		},
	}
}

// printStatus opens the repository just connected and shows its status.
func (a *app) printStatus(ctx context.Context, password string) error {
	config, err := a.configFile()
	if err != nil {
		return err
	}
	rep, err := repository.Open(ctx, repository.OpenOptions{ConfigFile: config, Password: password, Log: a.log})
	if err != nil {
		return err
	}
	return a.showStatus(ctx, rep)
}

// showStatus shows the status of rep, and closes it.
func (a *app) showStatus(ctx context.Context, rep *repository.Repository) error {
	s, err := rep.Status(ctx)
	res := statusResult{Status: s}
	if err == nil {
		res.Missing, err = missingPoints(ctx, rep)
	}
	if err == nil {
		err = a.print(res, func(t *table) { writeStatus(t, res) })
	}
	return errors.Join(err, rep.Close(context.WithoutCancel(ctx)))
}

// statusResult is what "varve repo status -o json" prints.
type statusResult struct {
	*repository.Status
	Missing []backup.MissingPoint `json:"missingPoints,omitempty"`
}

func missingPoints(ctx context.Context, rep *repository.Repository) ([]backup.MissingPoint, error) {
	cat, err := points.List(ctx, rep, points.ListOptions{})
	if err != nil {
		return nil, err
	}
	return backup.MissingPoints(ctx, rep, cat)
}

func writeStatus(t *table, s statusResult) {
	t.row("Repository:", s.Place)
	if s.UniqueID != "" {
		t.row("Unique ID:", s.UniqueID)
	}
	if s.Writable {
		t.row("Access:", "read and write")
	} else {
		t.row("Access:", "read-only: "+s.ReadOnly)
	}
	t.row("Cluster:", s.Cluster)
	t.row("Kopia client:", s.Client)
	if s.UniqueID == "" {
		return
	}
	t.row("Format:", s.Format)
	t.row("Hash:", s.Hash)
	t.row("Encryption:", s.Encryption)
	if s.Compression != "" {
		t.row("Compression:", s.Compression)
	}
	if s.ECCPercent > 0 {
		t.row("Error correction:", s.ECCPercent, "% added")
	}
	if s.Retention.Mode != "" {
		period := days(time.Duration(s.Retention.PeriodSeconds) * time.Second)
		text := s.Retention.Mode + " for " + period.String()
		if s.Retention.Extended {
			text += ", extended by maintenance"
		} else {
			text += ", NOT extended by maintenance"
		}
		t.row("Object lock:", text)
	}
	t.row("Index blobs:", s.IndexBlobs)
	for _, u := range s.Unreadable {
		t.row("Unreadable:", "pack "+u.Pack+", a part of the list of recovery points: "+u.Reason)
	}
	for _, m := range s.Missing {
		t.row("Missing:", m.String())
	}
	for i, u := range s.Unknown {
		if i == shownProblems {
			t.row("In no index:", fmt.Sprintf("and %d more packs", len(s.Unknown)-i))
			break
		}
		t.row("In no index:", fmt.Sprintf("pack %s, %s: an index blob is lost", u.Pack, t.bytes(u.Bytes)))
	}
	if s.Capacity != nil {
		t.row("Space left:", t.bytes(s.Capacity.Free)+" of "+t.bytes(s.Capacity.Size))
	}
	if s.Cache.Directory == "" {
		t.row("Disk cache:", "none")
	} else {
		t.row("Disk cache:", t.bytes(s.Cache.Used)+" of "+t.bytes(s.Cache.ContentLimit+s.Cache.MetadataLimit)+" in "+s.Cache.Directory)
	}
	if s.Limits.UploadBytesPerSecond > 0 {
		t.row("Upload limit:", t.bytes(int64(s.Limits.UploadBytesPerSecond))+"/s")
	}
	if s.Limits.DownloadBytesPerSecond > 0 {
		t.row("Download limit:", t.bytes(int64(s.Limits.DownloadBytesPerSecond))+"/s")
	}
	owner := s.Maintenance.Owner
	switch {
	case owner == "":
		owner = "none: it never runs"
	case s.Maintenance.Here:
		owner += " (this client)"
	}
	t.row("Maintenance owner:", owner)
	t.row("Next quick run:", due(t, s.Maintenance.NextQuick))
	t.row("Next full run:", due(t, s.Maintenance.NextFull))
}

func due(t *table, at time.Time) string {
	if at.IsZero() {
		return "never ran"
	}
	return t.time(at)
}

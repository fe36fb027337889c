package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/progress"
)

// withRepository opens the connected repository for the time of a call.
func (a *app) withRepository(ctx context.Context, use func(*repository.Repository) error) (err error) {
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	return use(repo)
}

// clusterOf is the cluster that a volume without one is of.
func (a *app) clusterOf(repo *repository.Repository) string {
	if a.flags.cluster != "" {
		return a.flags.cluster
	}
	return repo.Cluster()
}

// names gives the names of points and volumes on the command line their meaning.
func (a *app) names(repo *repository.Repository, cat *backup.Catalog) backup.Names {
	return backup.Names{Catalog: cat, Cluster: a.clusterOf(repo), Fallback: a.tellOther(repo)}
}

// tellOther says that a name means a volume of another cluster.
func (a *app) tellOther(repo *repository.Repository) func(string, backup.Volume) {
	return func(name string, v backup.Volume) {
		a.log.Warn("this cluster has nothing of that name; another cluster's is used",
			"name", name, "cluster", a.clusterOf(repo), "used", v.FullName())
	}
}

// volumeNamed is the volume that a command which reads means.
func volumeNamed(names backup.Names, text string) (backup.Volume, error) {
	v, err := names.Volume(text)
	if err != nil && !errors.Is(err, backup.ErrAmbiguous) {
		return v, &usageError{err} // the text is no name of a volume
	}
	return v, err
}

// pointView is a recovery point as lists print it.
type pointView struct {
	Name         string    `json:"name"`
	ID           string    `json:"id"`
	Cluster      string    `json:"cluster"`
	Namespace    string    `json:"namespace"`
	Volume       string    `json:"volume"`
	Time         time.Time `json:"time"`
	Generation   int64     `json:"generation,omitempty"`
	Kind         string    `json:"kind"`
	Parent       string    `json:"parent,omitempty"`
	Lineage      string    `json:"lineage,omitempty"` // ID of the first point of its disk, if that is not the volume's first disk
	Size         int64     `json:"size"`
	BlockSize    int64     `json:"blockSize,omitempty"`
	ChangeID     string    `json:"changeID,omitempty"`
	VolumeHandle string    `json:"volumeHandle,omitempty"`
	Pins         []string  `json:"pins,omitempty"`
	Program      string    `json:"writtenBy,omitempty"` // where it was not Varve

	// Unread is how many bytes could not be read when the point was made, and are zeroes.
	Unread             int64 `json:"unread,omitempty"`
	NotCrashConsistent bool  `json:"notCrashConsistent,omitempty"`

	Verified    *backup.VerifyRecord `json:"verified,omitempty"`
	Quarantined *backup.Quarantine   `json:"quarantined,omitempty"`
	InUse       []backup.LeaseInfo   `json:"inUse,omitempty"`
}

// notes is what the repository knows about points beside themselves.
type notes struct {
	verified    map[string]backup.VerifyRecord
	quarantined map[string]backup.Quarantine
	leases      map[string][]backup.LeaseInfo
}

func loadNotes(ctx context.Context, repo *repository.Repository) (n notes, err error) {
	if n.verified, err = backup.LastVerified(ctx, repo); err != nil {
		return n, err
	}
	if n.quarantined, err = backup.Quarantined(ctx, repo); err != nil {
		return n, err
	}
	n.leases, err = backup.Leases(ctx, repo)
	return n, err
}

func (n notes) view(p *backup.Point) pointView {
	v := viewOf(p)
	if r, ok := n.verified[p.ID]; ok {
		v.Verified = &r
	}
	if q, ok := n.quarantined[p.ID]; ok {
		v.Quarantined = &q
	}
	v.InUse = n.leases[p.ID]
	return v
}

func viewOf(p *backup.Point) pointView {
	return pointView{
		Name: p.Name(), ID: p.ID, Cluster: p.Volume.Cluster, Namespace: p.Volume.Namespace, Volume: p.Volume.Name,
		Unread: p.Unread, NotCrashConsistent: p.NotCrashConsistent,
		Time: p.Time, Generation: p.Generation, Kind: p.Kind, Parent: p.Parent, Lineage: p.Lineage, Size: p.Size, BlockSize: p.BlockSize,
		ChangeID: p.ChangeID, VolumeHandle: p.VolumeHandle, Pins: p.Pins, Program: p.Foreign,
	}
}

func viewsOf(points []*backup.Point) []pointView {
	out := make([]pointView, len(points))
	for i, p := range points {
		out[i] = viewOf(p)
	}
	return out
}

// state says in a word or two what is special about a point.
func (v pointView) state() string {
	var s []string
	switch {
	case v.Quarantined != nil:
		s = append(s, "quarantined")
	case v.Verified != nil && !v.Verified.OK:
		s = append(s, "damaged")
	case v.Verified != nil && v.Verified.Read > 0:
		s = append(s, fmt.Sprintf("verified, %.4g %% read", 100*v.Verified.Read))
	case v.Verified != nil:
		s = append(s, "verified")
	}
	if v.Lineage != "" && v.Lineage == v.ID {
		s = append(s, "new disk")
	}
	if v.Unread > 0 {
		s = append(s, progress.FormatBytes(v.Unread)+" unread")
	}
	if v.NotCrashConsistent {
		s = append(s, "not crash-consistent")
	}
	return strings.Join(s, ", ")
}

// shortID is the beginning of an ID, enough to name it.
func shortID(id string) string { return id[:min(len(id), 12)] }

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
)

// withRepository opens the connected repository for a call.
func (a *app) withRepository(ctx context.Context, use func(*repository.Repository) error) error {
	return a.withRepositoryBy(ctx, repository.Open, use)
}

func (a *app) withRepositoryBy(ctx context.Context, open func(context.Context, repository.OpenOptions) (*repository.Repository, error), use func(*repository.Repository) error) (err error) {
	repo, err := a.openRepositoryBy(ctx, open)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	return use(repo)
}

// clusterOf returns the cluster of names without one.
func (a *app) clusterOf(repo *repository.Repository) string {
	if a.flags.cluster != "" {
		return a.flags.cluster
	}
	return repo.Cluster()
}

// names returns the resolver for names on the command line.
func (a *app) names(repo *repository.Repository, cat *points.Catalog) points.Names {
	return points.Names{Catalog: cat, Cluster: a.clusterOf(repo), Fallback: a.tellOther(repo)}
}

// tellOther returns the Fallback of points.Names: it logs that a name means a volume of
// another cluster.
func (a *app) tellOther(repo *repository.Repository) func(string, points.Volume) {
	return func(name string, v points.Volume) {
		a.log.Warn("this cluster has no such name; another cluster's is used",
			"name", name, "cluster", a.clusterOf(repo), "used", v.FullName())
	}
}

// volumeNamed resolves a volume for a command that reads.
func volumeNamed(names points.Names, text string) (points.Volume, error) {
	v, err := names.Volume(text)
	if err != nil && !errors.Is(err, points.ErrAmbiguous) {
		return v, &usageError{err} // not the name of a volume
	}
	return v, err
}

// pointView is a recovery point in lists.
type pointView struct {
	Name         string    `json:"name"`
	ID           string    `json:"id"`
	Cluster      string    `json:"cluster"`
	Namespace    string    `json:"namespace"`
	Volume       string    `json:"volume"`
	Time         time.Time `json:"time"`
	Generation   int64     `json:"generation,omitempty"`
	Kind         string    `json:"kind"`
	Content      string    `json:"content,omitempty"` // "stream" for a stream
	Parent       string    `json:"parent,omitempty"`
	Lineage      string    `json:"lineage,omitempty"` // ID of the first point of its disk, if that is not the volume's first disk
	Size         int64     `json:"size"`
	BlockSize    int64     `json:"blockSize,omitempty"`
	ChangeID     string    `json:"changeID,omitempty"`
	VolumeHandle string    `json:"volumeHandle,omitempty"`
	Pins         []string  `json:"pins,omitempty"`
	Program      string    `json:"writtenBy,omitempty"` // if it was not Varve

	// Unread is the number of bytes that could not be read when the point was made, and are
	// zeroes.
	Unread             int64 `json:"unread,omitempty"`
	NotCrashConsistent bool  `json:"notCrashConsistent,omitempty"`
	// Consistency is the recorded level, and Group the group of the point.
	Consistency string           `json:"consistency,omitempty"`
	Group       *blocktree.Group `json:"group,omitempty"`
	// GroupIncomplete means that another point of the group is missing.
	GroupIncomplete bool `json:"groupIncomplete,omitempty"`

	Verified    *backup.VerifyRecord `json:"verified,omitempty"`
	Quarantined *points.Quarantine   `json:"quarantined,omitempty"`
	InUse       []points.LeaseInfo   `json:"inUse,omitempty"`
}

// notes are the repository's records about points.
type notes struct {
	verified    map[string]backup.VerifyRecord
	quarantined map[string]points.Quarantine
	leases      map[string][]points.LeaseInfo
	groups      *points.Groups
}

// loadNotes reads them. The catalogue must be of all volumes.
func loadNotes(ctx context.Context, repo *repository.Repository, cat *points.Catalog) (n notes, err error) {
	n.groups = cat.Groups()
	if n.verified, err = backup.LastVerified(ctx, repo); err != nil {
		return n, err
	}
	if n.quarantined, err = points.Quarantined(ctx, repo); err != nil {
		return n, err
	}
	n.leases, err = points.Leases(ctx, repo)
	return n, err
}

func (n notes) view(p *points.Point) pointView {
	v := viewOf(p)
	if r, ok := n.verified[p.ID]; ok {
		v.Verified = &r
	}
	if q, ok := n.quarantined[p.ID]; ok {
		v.Quarantined = &q
	}
	v.InUse = n.leases[p.ID]
	if g := n.groups.Of(p); g != nil {
		v.GroupIncomplete = !g.Complete()
	}
	return v
}

func viewOf(p *points.Point) pointView {
	content := ""
	if p.Stream {
		content = blocktree.ContentStream
	}
	return pointView{
		Content: content,
		Name:    p.Name(), ID: p.ID, Cluster: p.Volume.Cluster, Namespace: p.Volume.Namespace, Volume: p.Volume.Name,
		Consistency: p.Consistency, Group: p.Group, Unread: p.Unread, NotCrashConsistent: p.NotCrashConsistent,
		Time: p.Time, Generation: p.Generation, Kind: p.Kind, Parent: p.Parent, Lineage: p.Lineage, Size: p.Size, BlockSize: p.BlockSize,
		ChangeID: p.ChangeID, VolumeHandle: p.VolumeHandle, Pins: p.Pins, Program: p.Foreign,
	}
}

func viewsOf(pts []*points.Point) []pointView {
	out := make([]pointView, len(pts))
	for i, p := range pts {
		out[i] = viewOf(p)
	}
	return out
}

// state describes in a word or two what is special about a point.
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
		s = append(s, bytesize.Format(v.Unread)+" unread")
	}
	if v.NotCrashConsistent {
		s = append(s, "not crash-consistent")
	}
	if v.Consistency == blocktree.ApplicationConsistent {
		s = append(s, v.Consistency)
	}
	switch {
	case v.Group == nil:
	case v.GroupIncomplete:
		s = append(s, "incomplete group "+v.Group.Name)
	default:
		s = append(s, "group "+v.Group.Name)
	}
	return strings.Join(s, ", ")
}

// shortID returns the first digits of an ID, enough to name it.
func shortID(id string) string { return id[:min(len(id), 12)] }

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

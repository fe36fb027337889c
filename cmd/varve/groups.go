package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// groupView is a group of recovery points in lists.
type groupView struct {
	Name    string    `json:"name"`
	ID      string    `json:"id"`
	Cluster string    `json:"cluster"`
	Time    time.Time `json:"time"`
	// Complete means that each member has a point; Missing are the volumes without one.
	Complete bool     `json:"complete"`
	Members  []string `json:"members"`
	Missing  []string `json:"missing,omitempty"`
	// Consistency of the group as a whole, none if it is incomplete; empty if it was not
	// recorded.
	Consistency string      `json:"consistency,omitempty"`
	Size        int64       `json:"size"` // bytes, of all points
	Points      []pointView `json:"points"`

	group *points.Group
}

func (n notes) group(g *points.Group) groupView {
	v := groupView{
		Name: g.String(), ID: g.ID, Cluster: g.Name.Cluster, Time: g.Time,
		Complete: g.Complete(), Consistency: g.Consistency(), group: g, Points: []pointView{},
	}
	for _, m := range g.Wanted {
		v.Members = append(v.Members, m.String())
	}
	for _, m := range g.Missing {
		v.Missing = append(v.Missing, m.String())
	}
	for _, p := range g.Points {
		v.Points = append(v.Points, n.view(p))
		v.Size += p.Size
	}
	return v
}

// state describes in a few words what is special about a group.
func (v groupView) state() string {
	var s []string
	if !v.Complete {
		s = append(s, "incomplete: no "+strings.Join(v.Missing, ", "))
	}
	for _, p := range v.Points {
		p.Group, p.Consistency = nil, "" // shown for the group
		if state := p.state(); state != "" {
			s = append(s, p.Volume+" "+state)
		}
	}
	return strings.Join(s, "; ")
}

// pins returns the pins of all points.
func (v groupView) pins() string {
	var out []string
	seen := map[string]bool{}
	for _, p := range v.Points {
		for _, pin := range p.Pins {
			if !seen[pin] {
				seen[pin] = true
				out = append(out, pin)
			}
		}
	}
	return strings.Join(out, ",")
}

// consistency returns the level in words.
func (v groupView) consistency() string {
	switch v.Consistency {
	case "":
		return "not recorded"
	case blocktree.NotConsistent:
		if !v.Complete {
			return "none: incomplete"
		}
	}
	return v.Consistency
}

func (a *app) listGroups(ctx context.Context, repo *repository.Repository, of string) error {
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return err
	}
	n, err := loadNotes(ctx, repo, cat)
	if err != nil {
		return err
	}
	cluster := a.clusterOf(repo)
	var only points.Volume
	if of != "" {
		if only, err = points.ParseVolume(of, cluster); err != nil {
			return fmt.Errorf("%w: %w", points.ErrNoSuchPoint, err)
		}
	}
	views := []groupView{}
	for _, g := range n.groups.All() {
		if of == "" || g.Name == only || slices.Contains(g.Wanted, only) {
			views = append(views, n.group(g))
		}
	}
	if len(views) == 0 && of != "" {
		return fmt.Errorf("%w: no group is called %s or has it as a member; \"varve list --groups\" shows all", points.ErrNoSuchPoint, only)
	}
	return a.print(views, func(t *table) {
		if len(views) == 0 {
			t.line("No groups. Make one with: varve backup SOURCE1 SOURCE2 --volume NAMESPACE/NAME")
			return
		}
		t.row("NAME", "ID", "POINTS", "SIZE", "CONSISTENCY", "PINS", "STATE")
		for _, v := range views {
			members := fmt.Sprint(len(v.Members))
			if !v.Complete {
				members = fmt.Sprintf("%d of %d", len(v.Members)-len(v.Missing), len(v.Members))
			}
			t.row(v.group.NameIn(cluster), shortID(v.ID), members, t.bytes(v.Size), v.consistency(), v.pins(), v.state())
		}
	})
}

func (a *app) showGroup(ctx context.Context, repo *repository.Repository, name string) error {
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return err
	}
	g, err := a.names(repo, cat).ReadGroup(name)
	if err != nil {
		return err
	}
	n, err := loadNotes(ctx, repo, cat)
	if err != nil {
		return err
	}
	res := struct {
		groupView

		Description string `json:"description,omitempty"`
	}{groupView: n.group(g)}
	rec, err := points.LoadRecord(ctx, repo, g.Points[0])
	if err != nil {
		return err
	}
	if rec.Group != nil {
		res.Description = rec.Group.Description
	}
	return a.print(res, func(t *table) {
		t.row("Name:", res.Name)
		t.row("ID:", res.ID)
		t.row("Cluster:", res.Cluster)
		if res.Description != "" {
			t.row("Description:", res.Description)
		}
		t.row("Consistency:", res.consistency())
		for _, p := range res.Points {
			shown := p
			shown.Group = nil
			t.row("Point:", p.Name+" ("+shortID(p.ID)+")", t.bytes(p.Size), cmp.Or(shown.state(), p.Kind))
		}
		for _, m := range res.Missing {
			t.row("Missing:", m)
		}
		if pins := res.pins(); pins != "" {
			t.row("Pins:", pins)
		}
	})
}

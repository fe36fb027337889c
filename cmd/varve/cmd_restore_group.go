package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/backup/repository"
)

// groupRestoreResult is what "varve restore --group -o json" prints.
type groupRestoreResult struct {
	Group   string          `json:"group"`
	ID      string          `json:"id"`
	Missing []string        `json:"missing,omitempty"` // volumes without a point in the group
	Points  []restoreResult `json:"points"`
	// Definition is the file with that of a virtual machine, and Defined whether libvirt has it.
	Definition string `json:"definition,omitempty"`
	Defined    bool   `json:"defined,omitempty"`
	// Served are the points that a virtual machine uses from a server, and that were not written.
	Served []string `json:"served,omitempty"`
}

func (a *app) restoreGroup(ctx context.Context, name string, args []string, f restoreFlags) (err error) {
	switch {
	case f.base != "" || f.changed != "":
		return usagef("--base and --changed are about one disk: restore the points of the group one by one")
	case len(args) == 1 && args[0] == "-":
		return usagef("a group is several disks: it does not go to standard output")
	}
	opt := backup.RestoreOptions{Verify: f.verify, Delta: f.delta, Restart: f.restart, Workers: f.workers}
	if opt.SpotCheck, err = parseShare(f.spotCheck); err != nil {
		return usagef("--verify-unchanged: %w", err)
	}
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return err
	}
	g, err := a.names(repo, cat).ReadGroup(name)
	if err != nil {
		return err
	}
	if !g.Complete() && !f.incomplete {
		return fmt.Errorf("%w: %s has no point of %s; nothing was written; choose another group (varve list --groups), or give --incomplete for the %d points it has",
			backup.ErrIncompleteGroup, g, g.Missing[0], len(g.Members()))
	}
	var vm *vmRestore
	var paths []string
	members, formats := g.Members(), make([]string, len(g.Members()))
	if f.vm.vm {
		if vm, err = a.planVM(ctx, repo, g, args, f); err != nil {
			return err
		}
		members, paths, formats = vm.members, vm.paths, vm.formats
	} else if paths, err = groupTargets(g, args); err != nil {
		return err
	}
	if f.format != "" && f.format != qemu.Raw {
		for i := range paths { // the names of files in a directory
			if len(args) == 1 && !strings.Contains(args[0], "=") && !members[i].Stream {
				paths[i] = strings.TrimSuffix(paths[i], ".img") + "." + f.format
			}
		}
	}
	if err := oneEach(members, paths); err != nil {
		return err
	}
	// All points are held before the first is read, since each restore holds only its own.
	cache := image.NewCache(probeCacheBytes)
	defer cache.Close()
	held := disks.New(repo, cache, disks.Options{Purpose: "restore of group " + g.String(), Lease: disks.AtOnce, Streams: true, Log: a.log})
	defer func() { err = errors.Join(err, held.Close(context.WithoutCancel(ctx))) }()
	for _, p := range members {
		if _, err := held.Hold(ctx, p); err != nil {
			return err
		}
		a.warnOfRestore(p)
	}
	opened, err := a.openGroupRestore(ctx, repo, members, paths, formats, f, opt)
	if err != nil {
		return err
	}
	res := groupRestoreResult{Group: g.NameIn(a.clusterOf(repo)), ID: g.ID}
	for _, v := range g.Missing {
		res.Missing = append(res.Missing, v.String())
	}
	for i, t := range opened {
		a.left = t.leftOfGroup(i, len(opened), f) // for an interrupt, whose error says nothing
		end := a.restoreProgress(t.point, &t.opt)
		one, err := t.run(ctx, repo)
		end()
		if err != nil {
			for _, t := range opened[i+1:] {
				err = errors.Join(err, t.abandon())
			}
			return fmt.Errorf("%w; %s", err, a.left)
		}
		res.Points = append(res.Points, describeRestore(t.point, t.path, one))
	}
	a.done(fmt.Sprintf("%d of %d points of the group are restored", len(opened), len(opened)))
	if vm != nil {
		if res.Definition, err = vm.finish(ctx, a, f); err != nil {
			return err
		}
		res.Defined = f.vm.define
		for _, p := range vm.served {
			res.Served = append(res.Served, p.NameIn(a.clusterOf(repo)))
		}
	}
	return a.print(res, func(t *table) {
		for i, one := range res.Points {
			writeRestore(t, opened[i].point.NameIn(a.clusterOf(repo)), one)
		}
		t.line("restored group %s (ID %s): %s", res.Group, shortID(res.ID), count(len(res.Points), "recovery point", "recovery points"))
		for _, v := range res.Missing {
			t.line("  not restored: the group has no point of %s", v)
		}
		if vm != nil {
			vm.write(t, res, f)
		}
	})
}

// leftOfGroup is what remains of a group of which this point is being restored after done
// others, and what a second run does.
func (t *openedRestore) leftOfGroup(done, all int, f restoreFlags) string {
	left := fmt.Sprintf("%d of %d points of the group are restored; run it again", done, all)
	resumes := t.resumes() && !f.restart
	switch {
	case f.delta: // which compares finished ones
	case done == 0 && resumes:
		left += " to continue"
	case done == 0 && !t.image && !f.overwrite:
		left += " with --overwrite"
	case done > 0:
		left += " with --overwrite: finished ones are written again"
		if resumes {
			left += ", the interrupted one continues"
		}
	}
	return left
}

// openGroupRestore opens the targets of all points; with an error none is open.
func (a *app) openGroupRestore(ctx context.Context, repo *repository.Repository, pts []*points.Point, paths, formats []string, f restoreFlags, opt backup.RestoreOptions) (opened []*openedRestore, err error) {
	defer func() {
		if err != nil {
			for _, t := range opened {
				err = errors.Join(err, t.abandon())
			}
			opened = nil
		}
	}()
	for i, p := range pts {
		one := f
		if one.format = cmp.Or(formats[i], f.format); p.Stream {
			one.format = "" // it is no disk
		}
		t, err := a.openRestore(ctx, repo, p, paths[i], one, opt)
		if err != nil {
			return opened, fmt.Errorf("%s: %w; nothing was written by this run", p.Volume, err)
		}
		opened = append(opened, t)
	}
	return opened, nil
}

// groupTargets returns the targets of the members that have a point, in their order: files in
// the directory that is the only argument, or as given by MEMBER=TARGET.
func groupTargets(g *points.Group, args []string) ([]string, error) {
	members := g.Members()
	out := make([]string, len(members))
	if len(args) == 1 && !strings.Contains(args[0], "=") {
		dir := args[0]
		if st, err := os.Stat(dir); err == nil && !st.IsDir() {
			return nil, usagef("%s is no directory: give one, or MEMBER=TARGET for each of %s", dir, memberNames(g))
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("restore group %s: %w", g, err)
		}
		for i, p := range members {
			name := p.Volume.Name
			if p.Volume.Namespace != g.Name.Namespace {
				name = p.Volume.Namespace + "-" + name
			}
			if !p.Stream {
				name += ".img"
			}
			out[i] = filepath.Join(dir, name)
		}
		return out, nil
	}
	used := map[string]string{}
	for _, arg := range args {
		name, target, ok := strings.Cut(arg, "=")
		if !ok || target == "" {
			return nil, usagef("%q: want MEMBER=TARGET for each of %s, or one directory", arg, memberNames(g))
		}
		i := findMember(g, members, name)
		switch {
		case i < 0:
			return nil, usagef("%q is no member of group %s that has a point: %s", name, g, memberNames(g))
		case out[i] != "":
			return nil, usagef("%s has two targets: %s and %s", members[i].Volume, out[i], target)
		}
		full, err := filepath.Abs(target)
		if err != nil {
			return nil, fmt.Errorf("restore to %s: %w", target, err)
		}
		if other, taken := used[full]; taken {
			return nil, usagef("%s and %s have the same target %s", other, members[i].Volume, target)
		}
		used[full], out[i] = members[i].Volume.String(), target
	}
	for i, p := range members {
		if out[i] == "" {
			return nil, usagef("no target for %s: give %s=TARGET, or restore the other points one by one", p.Volume, p.Volume.Name)
		}
	}
	return out, nil
}

// oneEach refuses a directory in which two members would have the same file.
func oneEach(members []*points.Point, paths []string) error {
	of := map[string]string{}
	for i, p := range members {
		if other, taken := of[paths[i]]; taken {
			return usagef("%s and %s have the same target %s: give MEMBER=TARGET for each", other, p.Volume, paths[i])
		}
		of[paths[i]] = p.Volume.String()
	}
	return nil
}

// findMember finds a member by namespace/name, by its name, or by the part of its name that
// distinguishes it: root for shop/vm-root in group shop/vm.
func findMember(g *points.Group, members []*points.Point, name string) int {
	for _, match := range []func(points.Volume) bool{
		func(v points.Volume) bool { return v.String() == name },
		func(v points.Volume) bool { return v.Name == name },
		func(v points.Volume) bool { return v.Name == g.Name.Name+"-"+name },
	} {
		found := -1
		for i, p := range members {
			if match(p.Volume) {
				if found >= 0 {
					return -1
				}
				found = i
			}
		}
		if found >= 0 {
			return found
		}
	}
	return -1
}

func memberNames(g *points.Group) string {
	var names []string
	for _, p := range g.Members() {
		names = append(names, p.Volume.String())
	}
	return strings.Join(names, ", ")
}

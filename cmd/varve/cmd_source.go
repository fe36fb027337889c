package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/source"
)

func newSourceCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "source",
		GroupID: groupBackup,
		Short:   "Describe a source of backups, and remove its change tracking",
	}
	cmd.AddCommand(newSourceInfoCommand(a), newSourceForgetCommand(a))
	return cmd
}

func newSourceInfoCommand(a *app) *cobra.Command {
	var f sourceFlags
	var volume string
	cmd := &cobra.Command{
		Use:   "info SOURCE",
		Short: "Describe a source, and what the next backup of it would read",
		Long: `Show the type of a source, its size, what tracks its changes, and how much the
next backup would read: an increment of the latest recovery point of --volume,
else a full. Nothing is changed on the source.`,
		Example: `  varve source info vm.qcow2 --volume shop/vm`,
		Args:    cobra.ExactArgs(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return a.sourceInfo(cmd.Context(), args[0], volume, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&volume, "volume", "", "volume whose latest recovery point the next backup builds on, namespace/name")
	f.addReading(fl)
	return cmd
}

// sourceInfo is what "varve source info -o json" prints.
type sourceInfo struct {
	Source string           `json:"source"`
	Disks  []sourceDiskInfo `json:"disks"`
}

type sourceDiskInfo struct {
	Name   string   `json:"name,omitempty"`
	Kind   string   `json:"kind"`
	Size   int64    `json:"size"`
	Base   string   `json:"base,omitempty"` // the change ID that the next backup builds on
	By     string   `json:"changesBy"`
	Reads  int64    `json:"reads"` // bytes
	Passed []string `json:"passed,omitempty"`
	Notes  []string `json:"notes,omitempty"`
}

func (a *app) sourceInfo(ctx context.Context, uri, volume string, f sourceFlags) (err error) {
	opt := f.options()
	opt.Inspect, opt.Live, opt.Log = true, true, a.log
	baseOf := func(string) *cbt.Base { return nil }
	if volume != "" {
		if baseOf, opt.Owner, err = a.latestOf(ctx, volume); err != nil {
			return err
		}
		opt.Base = func(disk string) string {
			if b := baseOf(disk); b != nil {
				return b.ChangeID
			}
			return ""
		}
	}
	session, err := source.Open(ctx, uri, opt)
	if errors.Is(err, source.ErrScheme) || errors.Is(err, source.ErrURI) {
		return &usageError{err}
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, session.Close()) }()
	res := sourceInfo{Source: uri}
	for _, d := range session.Disks() {
		info := sourceDiskInfo{Name: d.Name, Kind: d.Kind, Size: d.Bytes.Size(), Notes: d.Notes}
		base := baseOf(d.Name)
		if base != nil {
			info.Base = base.ChangeID
		}
		if e := d.Estimate; e != nil {
			if info.By, info.Reads = e.By, e.Bytes; e.Why != "" {
				info.Passed = []string{e.Why}
			}
			res.Disks = append(res.Disks, info)
			continue
		}
		for _, src := range append(d.Changes, cbt.Compare{}) {
			info.Reads = 0
			rep, err := src.Changes(ctx, cbt.Request{Base: base, Size: info.Size}, func(e cbt.Extent) error {
				if !e.Zero {
					info.Reads += e.Length
				}
				return nil
			})
			if err == nil {
				info.By = rep.Source
				break
			}
			if _, ok := cbt.FallbackReason(err); !ok && !errors.Is(err, cbt.ErrNoBase) {
				return err
			} else if ok {
				info.Passed = append(info.Passed, err.Error())
			}
		}
		res.Disks = append(res.Disks, info)
	}
	return a.print(res, func(t *table) {
		for _, d := range res.Disks {
			name := uri
			if d.Name != "" {
				name = d.Name
			}
			t.line("%s: %s of %s", name, d.Kind, t.bytes(d.Size))
			t.line("  the next backup reads %s, changes by %s", t.bytes(d.Reads), d.By)
			for _, p := range d.Passed {
				t.line("  not by %s", p)
			}
			for _, n := range d.Notes {
				t.line("  note: %s", n)
			}
		}
	})
}

// latestOf returns what the next backup of a volume builds on, nil for nothing, by the name of
// the disk of a machine or an empty one; and the owner of what is left on its source.
func (a *app) latestOf(ctx context.Context, volume string) (base func(disk string) *cbt.Base, owner string, err error) {
	repo, err := a.openRepository(ctx)
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	v, err := points.ParseVolume(volume, a.clusterOf(repo))
	if err != nil {
		return nil, "", &usageError{err}
	}
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return nil, "", err
	}
	base = func(disk string) *cbt.Base {
		of := v
		if disk != "" {
			of = memberVolume(v, disk)
		}
		p := cat.Latest(of)
		if p == nil {
			return nil
		}
		return &cbt.Base{PointID: p.ID, ChangeID: p.ChangeID, SnapshotHandle: p.SnapshotHandle, VolumeHandle: p.VolumeHandle, Size: p.Size}
	}
	return base, a.sourceOptions(sourceFlags{}, repo, v).Owner, nil
}

func newSourceForgetCommand(a *app) *cobra.Command {
	var f sourceFlags
	var volume string
	cmd := &cobra.Command{
		Use:   "forget SOURCE",
		Short: "Remove what tracks the changes of a source",
		Long: `Remove what Varve left on a source to track its changes, such as bitmaps in a
qcow2: those of --volume, or all. The next backup reads and compares the whole disk.`,
		Example: `  varve source forget vm.qcow2`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			opt, ctx := f.options(), cmd.Context()
			var err error
			if volume != "" {
				if _, opt.Owner, err = a.latestOf(ctx, volume); err != nil {
					return err
				}
			}
			removed, err := source.Forget(ctx, args[0], opt)
			if errors.Is(err, source.ErrScheme) {
				return &usageError{err}
			}
			if err != nil {
				return err
			}
			res := struct {
				Removed []string `json:"removed"`
			}{append([]string{}, removed...)}
			return a.print(res, func(t *table) {
				for _, name := range removed {
					t.line("removed %s", name)
				}
				if len(removed) == 0 {
					t.line("%s", fmt.Sprintf("nothing of Varve's tracks %s", args[0]))
				}
			})
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&volume, "volume", "", "only what tracks this volume, namespace/name")
	f.addReading(fl)
	return cmd
}

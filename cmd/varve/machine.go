package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/source"
)

// machineFlags say how a virtual machine is backed up.
type machineFlags struct {
	include, exclude []string
	scratch          string
	freeze           bool
}

func (f *machineFlags) add(fl *pflag.FlagSet) {
	fl.StringSliceVar(&f.include, "include", nil, "the only disks of a virtual machine to back up, by name")
	fl.StringSliceVar(&f.exclude, "exclude", nil, "disks of a virtual machine to leave out, by name")
	fl.StringVar(&f.scratch, "scratch", source.DefaultScratch, "directory for what a running virtual machine overwrites while it is backed up")
	fl.BoolVar(&f.freeze, "freeze", false, "freeze the file systems of a virtual machine, by the agent in it, for the moment of the backup")
}

func (f *machineFlags) set(opt *source.Options) {
	opt.Include, opt.Exclude, opt.Scratch, opt.Freeze = f.include, f.exclude, f.scratch, f.freeze
	if self, err := os.Executable(); err == nil {
		opt.Self = []string{self, guestFreezeName}
	}
}

// guestFreezeName is the process that thaws a guest however its backup ends.
const guestFreezeName = "guest-freeze"

func newGuestFreezeCommand() *cobra.Command {
	var thaw bool
	cmd := &cobra.Command{
		Use:    guestFreezeName + " AGENT",
		Hidden: true,
		Short:  "Freeze a guest until standard input ends",
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
			return source.GuardFreeze(context.WithoutCancel(cmd.Context()), args[0], thaw, cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&thaw, "thaw", false, "thaw it only")
	return cmd
}

// bases returns the change IDs of the latest recovery points of a volume's members.
func bases(ctx context.Context, repo *repository.Repository) (func(points.Volume) string, error) {
	cat, err := points.List(ctx, repo, points.ListOptions{})
	if err != nil {
		return nil, err
	}
	return func(v points.Volume) string {
		if p := cat.Latest(v); p != nil {
			return p.ChangeID
		}
		return ""
	}, nil
}

// memberVolume is the volume of one disk of a backup of several.
func memberVolume(group points.Volume, disk string) points.Volume {
	group.Name += "-" + disk
	return group
}

// diskName is the name of a disk of a source that was given a name of its own, or none.
func diskName(given, disk string) string {
	if given != "" && disk != "" {
		return given + "-" + disk
	}
	return given + disk
}

// setMoment records how the moment of a machine's disks was made.
func setMoment(opt *backup.Options, m source.Machine) {
	at, frozen := m.Moment()
	if at.IsZero() {
		return
	}
	at = at.UTC().Truncate(time.Millisecond)
	opt.Time = at
	opt.Consistency = &blocktree.Consistency{Level: blocktree.CrashConsistent, Method: "machine", Time: at, OneMoment: true}
	if frozen > 0 {
		opt.Consistency.Holds = []blocktree.Hold{{
			Name: "guest-agent", Target: m.Name(), Start: at, Duration: frozen, Proven: true,
			Detail: "the guest's file systems were frozen",
		}}
	}
}

// machineOf returns the machine that a session is of, or nil.
func machineOf(s source.Session) source.Machine {
	m, _ := s.(source.Machine)
	return m
}

// partsOf lists what machines need beside their disks, with the volumes that keep it.
func (a *app) partsOf(open *openedSources, group points.Volume) (streams []part, err error) {
	for _, s := range open.sessions {
		m := machineOf(s)
		if m == nil {
			continue
		}
		for _, p := range m.Parts() {
			v := memberVolume(group, p.Name)
			if err := v.Check(); err != nil {
				return nil, err
			}
			streams = append(streams, part{v, p})
		}
	}
	return streams, nil
}

// part is a part of a machine and the volume it is kept as.
type part struct {
	volume points.Volume
	source.Part
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/imageio"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/target"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// elsewhere reports whether the target is neither a device nor a plain file of this machine.
func (f restoreFlags) elsewhere(path string) bool {
	return isNBD(path) || imageio.IsURI(path) || f.format != "" && f.format != qemu.Raw
}

// mayReplace refuses to replace an image that a virtual machine has open: it would continue with
// the file that has lost its name, and what it writes would be lost with that.
func (f restoreFlags) mayReplace(path string, o target.Options) error {
	if !o.Replace || o.Keep || f.force {
		return nil
	}
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return nil //nolint:nilerr // opening it says what is wrong
	}
	uses, err := disk.Uses(path)
	if err != nil {
		return err
	}
	if len(uses) > 0 {
		return &disk.InUseError{Path: path, Uses: uses, Advice: "stop the machine, or choose another target; --force replaces the file all the same, and what the machine writes is lost"}
	}
	return nil
}

// isNBD reports whether a target is an NBD URI.
func isNBD(uri string) bool {
	scheme, _, ok := strings.Cut(uri, "://")
	return ok && slices.Contains([]string{"nbd", "nbds", "nbd+unix", "nbds+unix"}, scheme)
}

// openRestoreElsewhere opens an NBD export, a disk in oVirt, or an image file of another format. It uses no
// journal: nothing proves that an export, or an image that qemu-nbd had open, still holds
// what an interrupted restore wrote.
func (a *app) openRestoreElsewhere(ctx context.Context, repo *repository.Repository, p *points.Point, path string, f restoreFlags, opt backup.RestoreOptions) (_ *openedRestore, err error) {
	if err := p.NeedDisk(); err != nil {
		return nil, err
	}
	o := target.Options{Size: p.Size, Log: a.log, Replace: f.overwrite, Keep: opt.Delta, FollowChain: f.followChain}
	t := &openedRestore{point: p, path: path, whole: isNBD(path) || imageio.IsURI(path), opt: opt}
	switch {
	case isNBD(path):
		uri, err := nbdclient.ParseURI(path)
		if err != nil {
			return nil, &usageError{err}
		}
		if t.target, err = target.OpenNBD(ctx, uri, o); err != nil {
			return nil, err
		}
	case imageio.IsURI(path):
		if t.target, err = target.OpenImageio(ctx, path, o); errors.Is(err, imageio.ErrURL) {
			return nil, &usageError{err}
		} else if err != nil {
			return nil, err
		}
	default:
		t.image = !opt.Delta
		if err := f.mayReplace(path, o); err != nil {
			return nil, err
		}
		if t.target, err = target.OpenImage(ctx, path, f.format, o); errors.Is(err, target.ErrExists) {
			return nil, fmt.Errorf("%w; replace it with --overwrite, write only what differs with --delta, or choose another name", err)
		} else if err != nil {
			return nil, err
		}
	}
	if t.target.Fresh() || f.overwrite {
		return t, nil
	}
	have, holds, err := contentsOf(t.target, t.target.Size())
	if err != nil {
		err = fmt.Errorf("%w: read what %s holds: %w; --overwrite writes without that check", errTargetExists, path, err)
	} else {
		err = mayRestoreOver(ctx, repo, p, path, have, holds, opt.Delta, opt.Base)
	}
	if err != nil {
		return nil, errors.Join(err, t.abandon())
	}
	return t, nil
}

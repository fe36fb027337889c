package main

import (
	"crypto/sha256"
	"encoding/hex"

	"github.com/spf13/pflag"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/source"
)

// sourceFlags say how to read a source.
type sourceFlags struct {
	format                  string
	bitmap                  string
	baseChangeID, changeID  string
	raw, followChain, track bool
}

// add adds the flags of a backup, addReading those for opening a source.
func (f *sourceFlags) add(fl *pflag.FlagSet) {
	f.addReading(fl)
	fl.StringVar(&f.changeID, "change-id", "", "with an NBD export or an oVirt transfer: name of the state that is read, for the next backup's --bitmap or --base-change-id")
	fl.BoolVar(&f.track, "track", false, "record in a qcow2, or by clones of a raw image (xfs, btrfs), what is written from now on, so that the next backup reads only that ('varve source forget' ends it)")
}

func (f *sourceFlags) addReading(fl *pflag.FlagSet) {
	fl.StringVar(&f.format, "format", "", "format of an image file: qcow2, vmdk, vhdx, vdi, vpc (.vhd) or raw (default by its name and content, which must agree)")
	fl.BoolVar(&f.raw, "raw", false, "back up the bytes of an image file itself, not the disk in it")
	fl.BoolVar(&f.followChain, "follow-chain", false, "let an image file lead to files in other folders, and to what is no file: a guest may have written its head")
	fl.StringVar(&f.bitmap, "bitmap", "", "dirty bitmap of an NBD export: what changed since the parent, whose change ID is its name")
	fl.StringVar(&f.baseChangeID, "base-change-id", "", "with an oVirt transfer: checkpoint that the backup was started from; with --bitmap: change ID of its beginning, if it is not its name")
}

func (f sourceFlags) options() source.Options {
	return source.Options{Format: f.format, Bitmap: f.bitmap, BaseChangeID: f.baseChangeID, ChangeID: f.changeID, Raw: f.raw, FollowChain: f.followChain, Track: f.track}
}

// sourceOptions returns the options of a source of a volume. What is left on the source is
// marked with the repository and the volume, so that what others left is not touched.
func (a *app) sourceOptions(f sourceFlags, repo *repository.Repository, v points.Volume) source.Options {
	opt := f.options()
	opt.Owner, opt.Log = short(repo.UniqueID())+"-"+short(v.FullName()), a.log
	return opt
}

// short returns eight characters derived from a name.
func short(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:4])
}

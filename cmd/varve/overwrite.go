package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/probe"
)

// contentsOf describes the content of a device or a file of size bytes; empty if there is
// nothing known.
func contentsOf(r io.ReaderAt, size int64) (*probe.Contents, string, error) {
	c, err := probe.ReadContents(r, size)
	var table *probe.TableError
	switch {
	case errors.As(err, &table):
		return &probe.Contents{}, "a damaged partition table (" + table.What + ")", nil
	case err != nil:
		return nil, "", err
	}
	return c, c.Describe(), nil
}

// refuseContents returns the error of a command that would overwrite something without
// --overwrite.
func refuseContents(path, holds, advice string) error {
	return fmt.Errorf("%w: %s holds %s: nothing was written; %s", errTargetExists, path, holds, advice)
}

// mayRestore refuses to overwrite what a target holds, unless it is what the restore
// replaces: the disk itself, or its base for a delta or the rest of an interrupted restore.
func mayRestore(ctx context.Context, repo *repository.Repository, p *points.Point, target *disk.Target, info fs.FileInfo, opt backup.RestoreOptions) error {
	// With a journal for it, the target is that of an interrupted restore.
	interrupted := !opt.Delta && backup.JournalTarget(opt.Journal) == target.Identity()
	if info.Mode().IsRegular() && info.Size() > 0 && !opt.Delta && !interrupted {
		return fmt.Errorf("%w: %s: replace it with --overwrite, write only what differs with --delta, or choose another name", errTargetExists, target.Path())
	}
	have, holds, err := targetContents(target)
	if err != nil {
		return fmt.Errorf("%w: read what %s holds: %w; --overwrite writes without that check", errTargetExists, target.Path(), err)
	}
	return mayRestoreOver(ctx, repo, p, target.Path(), have, holds, opt.Delta || interrupted, opt.Base)
}

// mayRestoreOver refuses to overwrite what a target holds, unless it is known to be the disk
// of the point or its base, and same allows that.
func mayRestoreOver(ctx context.Context, repo *repository.Repository, p *points.Point, path string, have *probe.Contents, holds string, same bool, base *points.Point) error {
	if holds == "" {
		return nil
	}
	if !same {
		return refuseContents(path, holds, "write over it with --overwrite, write only what differs with --delta, or choose another target")
	}
	for _, known := range []*points.Point{p, base} {
		if known == nil {
			continue
		}
		want, err := pointContents(ctx, repo, known)
		if err != nil {
			return err
		}
		if have.Same(want) {
			return nil
		}
	}
	return refuseContents(path, holds, "that is not the disk of "+p.Name()+"; to replace it use --overwrite, else choose another target")
}

// targetContents reads through another descriptor: a target has the size that it will have, a
// file may be longer or shorter.
func targetContents(target *disk.Target) (*probe.Contents, string, error) {
	f, err := os.Open(target.Path())
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, "", fmt.Errorf("size of %s: %w", target.Path(), err)
	}
	return contentsOf(f, size)
}

// pointContents recognises what a point's disk holds; nothing if its partition table is
// damaged.
func pointContents(ctx context.Context, repo *repository.Repository, p *points.Point) (_ *probe.Contents, err error) {
	cache := image.NewCacheWithWorkers(probeCacheBytes, 1)
	defer cache.Close()
	held := disks.New(repo, cache, disks.Options{Purpose: "restore", Lease: disks.Late, Streams: true})
	defer func() { err = errors.Join(err, held.Close(context.WithoutCancel(ctx))) }()
	d, err := held.Hold(ctx, p)
	if err != nil {
		return nil, err
	}
	defer d.Release()
	c, _, err := contentsOf(d.Image(), d.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	return c, nil
}

// probeCacheBytes bounds the cache while a disk is recognised.
const probeCacheBytes = 16 << 20

// mayOverwriteDevice refuses a device with known content.
func mayOverwriteDevice(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return nil // opening it for writing will report the error
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("size of %s: %w", path, err)
	}
	_, holds, err := contentsOf(f, size)
	if err != nil {
		return fmt.Errorf("%w: read what %s holds: %w; --overwrite writes without that check", errTargetExists, path, err)
	}
	if holds != "" {
		return refuseContents(path, holds, "write over it with --overwrite, or choose another name")
	}
	return nil
}

// tailAdvice returns advice about a device that is larger than the disk restored to it.
func tailAdvice(path string, target io.ReaderAt, size, diskSize int64) []string {
	if size <= diskSize {
		return nil
	}
	lines := []string{fmt.Sprintf("the device is %s larger than the disk; the rest of it was not changed", bytesize.Format(size-diskSize))}
	disk, _, err := contentsOf(io.NewSectionReader(target, 0, diskSize), diskSize)
	if err != nil {
		return lines
	}
	if whole, holds, err := contentsOf(target, size); err == nil && !whole.Same(disk) && holds != "" {
		lines = append(lines, fmt.Sprintf("that is %s, which hides the restored disk: see 'wipefs %s', and remove it", holds, path))
	}
	return append(lines, growAdvice(path, disk)...)
}

// growAdvice says how to grow what a disk holds to the end of a larger device.
func growAdvice(path string, c *probe.Contents) []string {
	switch {
	case c.Table != nil && c.Table.Scheme == "gpt":
		return []string{
			fmt.Sprintf("the backup copy of its GPT belongs at the device's end: move it with 'sgdisk -e %s'", path),
			"then partitions can be grown (growpart, parted), and the file systems in them",
		}
	case c.Table != nil:
		return []string{"partitions can be grown (growpart, parted), and the file systems in them"}
	case c.Signature == nil:
		return nil
	}
	if how, ok := growers[c.Signature.Type]; ok {
		return []string{fmt.Sprintf("grow it with "+how, path)}
	}
	return nil
}

// growers are the commands that grow what is on a device to its end.
var growers = map[string]string{
	"ext2": "'resize2fs %s'", "ext3": "'resize2fs %s'", "ext4": "'resize2fs %s'",
	"xfs": "'xfs_growfs' once it is mounted (%s)", "btrfs": "'btrfs filesystem resize max' once it is mounted (%s)",
	"ntfs": "'ntfsresize %s'", "f2fs": "'resize.f2fs %s'", "LVM2_member": "'pvresize %s'", "crypto_LUKS": "'cryptsetup resize' once it is open (%s)",
}

package backup

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/probe"
	"github.com/varve-io/varve/internal/zero"
)

// Serialled is a Disk that knows the WWN or serial number of its hardware; empty if it has
// none.
type Serialled interface {
	Serial() string
}

// maxSignatures bounds the signatures in a record.
const maxSignatures = 128

// blankEnds is how much of each end of a disk must be zero for the disk to be blank, in
// bytes.
const blankEnds = 1 << 20

// identify reads what identifies a disk: serial number, partition table, signatures.
func identify(d io.ReaderAt, size int64) (*blocktree.DiskIdentity, error) {
	id := &blocktree.DiskIdentity{}
	if s, ok := d.(Serialled); ok {
		id.Serial = s.Serial()
	}
	c, err := probe.ReadContents(d, size)
	var table *probe.TableError
	if errors.As(err, &table) {
		return id, nil // a partition table without an identity
	}
	if err != nil {
		return nil, err
	}
	add := func(partition int, s *probe.Signature) {
		if s != nil && s.Type != "swap" && s.Type != "swsuspend" && len(id.Signatures) < maxSignatures {
			id.Signatures = append(id.Signatures, blocktree.DiskSignature{Partition: partition, Type: s.Type, UUID: s.UUID})
		}
	}
	add(0, c.Signature)
	if c.Table != nil {
		if c.Table.ID != "" {
			id.TableID = c.Table.Scheme + " " + c.Table.ID
		}
		for i, s := range c.Volumes {
			add(c.Table.Partitions[i].Number, s)
		}
	}
	if c.Empty() {
		id.Blank, err = blank(d, size)
	}
	return id, err
}

// blank reports whether both ends of a disk are zeroes.
func blank(d io.ReaderAt, size int64) (bool, error) {
	p := make([]byte, min(blankEnds, size))
	for _, off := range []int64{0, size - int64(len(p))} {
		if n, err := d.ReadAt(p, off); n < len(p) {
			return false, fmt.Errorf("read both ends of the disk: %d of %d bytes at %d: %w", n, len(p), off, err)
		}
		if !zero.Only(p) {
			return false, nil
		}
	}
	return true, nil
}

// identityOf returns the identity of a point's disk: from its record, or, for a point of an
// older Varve, read from the disk.
func identityOf(ctx context.Context, repo *repository.Repository, p *points.Point, rec *blocktree.Record) (_ *blocktree.DiskIdentity, err error) {
	if rec.Disk != nil {
		return rec.Disk, nil
	}
	cache := image.NewCache(identityCache)
	defer cache.Close()
	held := disks.New(repo, cache, disks.Options{Purpose: "backup", Lease: disks.Late})
	defer func() { err = errors.Join(err, held.Close(context.WithoutCancel(ctx))) }()
	d, err := held.Hold(ctx, p)
	if err != nil {
		return nil, err
	}
	defer d.Release()
	return identify(d.Image(), d.Size())
}

// identityCache bounds the cache for reading an older point, in bytes.
const identityCache = 16 << 20

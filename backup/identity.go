package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/probe"
)

// Serialled is a Disk whose hardware has a name of its own, a WWN or a serial
// number. It is empty where there is none.
type Serialled interface {
	Serial() string
}

// maxSignatures bounds the signatures in a record.
const maxSignatures = 128

// blankEnds is how much of each end of a disk is read to call it blank, in bytes.
const blankEnds = 1 << 20

// identify reads what identifies a disk.
func identify(d io.ReaderAt, size int64) (*blocktree.DiskIdentity, error) {
	id := &blocktree.DiskIdentity{}
	if s, ok := d.(Serialled); ok {
		id.Serial = s.Serial()
	}
	c, err := probe.ReadContents(d, size)
	var table *probe.TableError
	if errors.As(err, &table) {
		return id, nil // a table, but none that says which
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
		if len(bytes.Trim(p, "\x00")) > 0 {
			return false, nil
		}
	}
	return true, nil
}

// identityOf is the identity of a point's disk: what its record has, or, of a point
// of an older Varve, what is on the disk.
func identityOf(ctx context.Context, repo *repository.Repository, p *Point, rec *blocktree.Record) (*blocktree.DiskIdentity, error) {
	if rec.Disk != nil {
		return rec.Disk, nil
	}
	root, err := OpenRoot(ctx, repo, p)
	if err != nil {
		return nil, err
	}
	cache := image.NewCache(identityCache)
	defer cache.Close()
	img, err := image.Open(repo, cache, root, p.Generation)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	return identify(img, img.Size())
}

// identityCache bounds what is kept of an older point while it is looked at, in bytes.
const identityCache = 16 << 20

package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/repository"
)

// OtherDiskPolicy says what to do with a disk that is not the one of the volume's
// newest point, or is smaller.
//
// The points of one disk are a lineage of their volume. Retention counts each
// lineage by itself: points of another disk, an empty one perhaps, do not push out
// those of the disk that was there before.
type OtherDiskPolicy int

// Policies for other disks.
const (
	RefuseOtherDisk OtherDiskPolicy = iota
	// BeginLineage has a disk that differs begin a lineage by itself.
	BeginLineage
	// NewDisk says that this is another disk, whatever is on it: it begins a lineage,
	// or goes on with the one it had before.
	NewDisk
)

// Errors about the identity of a disk.
var (
	// ErrOtherDisk means that the disk is not the one that was backed up before.
	ErrOtherDisk = errors.New("this is not the disk that was backed up before")
	// ErrShrunk means that the disk is smaller than it was.
	ErrShrunk = errors.New("the disk is smaller than it was")
)

// lineage is the place of a new point among the disks that its volume had.
type lineage struct {
	id     string // empty for the volume's first
	begins bool   // with the new point: id is set with its own
	reason string // why it begins
	// other is set where the points to build on are of another disk: no list of
	// changes is relative to them.
	other    bool
	identity *blocktree.DiskIdentity
}

// chooseLineage finds out whether this is the disk that was backed up before, and
// refuses another one or has it begin a lineage.
func (r *run) chooseLineage(ctx context.Context, cat *Catalog) error {
	l := &r.lineage
	var err error
	if l.identity, err = identify(r.opt.Disk, r.opt.Disk.Size()); err != nil {
		// It is read again as data, where errors are dealt with.
		slog.DebugContext(ctx, "cannot tell which disk this is", "volume", r.opt.Volume.String(), "error", err)
	}
	ref, err := r.reference(cat)
	if err != nil || ref == nil {
		return err
	}
	l.id = ref.Lineage
	was, claim, err := r.known(ctx, ref)
	if err != nil {
		return err
	}
	if l.identity == nil {
		l.identity = was
	}
	why := r.differs(was, claim)
	shrunk := ""
	if size := r.opt.Disk.Size(); size < ref.Size {
		shrunk = fmt.Sprintf("it has %d bytes, and had %d in %s", size, ref.Size, ref.Name())
	}
	switch {
	case r.opt.OtherDisk == NewDisk:
		return r.otherLineage(ctx, cat, ref, "--new-disk was given")
	case r.opt.OtherDisk == BeginLineage && why != "":
		return r.otherLineage(ctx, cat, ref, why)
	case r.opt.OtherDisk == BeginLineage && shrunk != "" && !r.opt.AllowShrink:
		return r.otherLineage(ctx, cat, ref, shrunk)
	case shrunk != "" && !r.opt.AllowShrink:
		if why != "" {
			shrunk += "; " + why
		}
		return fmt.Errorf("%w: %s: %s; no point was made; check the source, and if it was made smaller on purpose give --allow-shrink, "+
			"or --new-disk if it is another disk", ErrShrunk, r.opt.Volume, shrunk)
	case why != "":
		return fmt.Errorf("%w: %s: %s since %s; no point was made; check the source, and if it is the right one "+
			"give --new-disk: it begins a new lineage of the volume, and prune keeps the points of the old disk apart",
			ErrOtherDisk, r.opt.Volume, why, ref.Name())
	}
	if was != nil && l.identity != nil {
		r.notes = append(r.notes, was.Changes(l.identity)...)
	}
	return nil
}

// reference is the point whose disk this one should be: the newest of the volume, or
// of the lineage of the parent that was asked for; nil for the volume's first.
func (r *run) reference(cat *Catalog) (*Point, error) {
	v := r.opt.Volume
	if r.opt.Parent == "" || r.opt.Full {
		return cat.Latest(v), nil
	}
	p, err := r.namedParent(cat)
	if err != nil {
		return nil, err
	}
	if p.Volume != v {
		return cat.Latest(v), nil
	}
	of := cat.lineage(v, p.Lineage)
	return of[len(of)-1], nil
}

// known reads what the record of a point, or its disk, says of the disk it was made
// of. A point that cannot be read says nothing.
func (r *run) known(ctx context.Context, p *Point) (*blocktree.DiskIdentity, *blocktree.Claim, error) {
	rec, err := LoadRecord(ctx, r.repo, p)
	if err == nil {
		var id *blocktree.DiskIdentity
		if id, err = identityOf(ctx, r.repo, p, rec); err == nil {
			return id, rec.Claim, nil
		}
	}
	if ctx.Err() != nil || errors.Is(err, repository.ErrStorageFailed) {
		return nil, nil, err
	}
	slog.WarnContext(ctx, "cannot tell whether this is the disk that was backed up before", "point", p.Name(), "error", err)
	if rec != nil {
		return nil, rec.Claim, nil
	}
	return nil, nil, nil
}

// differs says why the disk is not the one that was, and is empty if it may be. Of two
// claims of Kubernetes the UIDs decide; the volume that is read is made of a
// snapshot, so that its serial says nothing.
func (r *run) differs(was *blocktree.DiskIdentity, claim *blocktree.Claim) string {
	now := r.lineage.identity
	if was == nil || now == nil {
		was, now = &blocktree.DiskIdentity{}, &blocktree.DiskIdentity{}
	}
	if c := r.opt.Claim; c != nil && claim != nil && c.UID != "" && claim.UID != "" {
		if c.UID != claim.UID {
			return fmt.Sprintf("the claim had UID %s, and has UID %s now", claim.UID, c.UID)
		}
		a, b := *was, *now
		a.Serial, b.Serial = "", ""
		return a.Differs(&b)
	}
	return was.Differs(now)
}

// otherLineage leaves the lineage of ref: for one that this disk had before, or a new one.
func (r *run) otherLineage(ctx context.Context, cat *Catalog, ref *Point, why string) error {
	l := &r.lineage
	tried := map[string]bool{ref.Lineage: true}
	for _, p := range slices.Backward(cat.Of(r.opt.Volume)) {
		if tried[p.Lineage] || l.identity == nil || r.opt.Disk.Size() < p.Size {
			continue
		}
		tried[p.Lineage] = true
		was, claim, err := r.known(ctx, p)
		if err != nil {
			return err
		}
		if was != nil && was.Recognises(l.identity) && r.differs(was, claim) == "" {
			l.id, l.other = p.Lineage, false
			r.notes = append(r.notes, fmt.Sprintf("this disk goes on with its own lineage, which %s was the newest of", p.Name()))
			return nil
		}
	}
	l.id, l.begins, l.other, l.reason = "", true, true, why
	r.notes = append(r.notes, "begins a new lineage of the volume: "+why)
	slog.InfoContext(ctx, "a new lineage begins", "volume", r.opt.Volume.String(), "reason", why, "before", ref.Name())
	if _, none := r.opt.Source.(cbt.Compare); r.opt.Source != nil && !none && !r.opt.Full {
		// What it lists is relative to the disk before.
		r.opt.Source = nil
		if len(r.opt.Fallback) > 0 {
			r.opt.Source, r.opt.Fallback = r.opt.Fallback[0], r.opt.Fallback[1:]
		}
	}
	return nil
}

// lineage returns the points of a volume's lineage, oldest first.
func (c *Catalog) lineage(v Volume, id string) (out []*Point) {
	for _, p := range c.Of(v) {
		if p.Lineage == id {
			out = append(out, p)
		}
	}
	return out
}

package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
)

// OtherDiskPolicy says what to do with a disk that is not the disk of the volume's newest
// point, or is smaller.
//
// The points of one disk are a lineage of their volume. Retention counts each lineage
// separately: points of another disk, perhaps an empty one, do not replace the points of the
// disk before.
type OtherDiskPolicy int

// Policies for other disks.
const (
	RefuseOtherDisk OtherDiskPolicy = iota
	// BeginLineage begins a lineage if the disk differs.
	BeginLineage
	// NewDisk treats the disk as another one, regardless of its content: it begins a
	// lineage, or continues the disk's earlier one.
	NewDisk
)

// Errors about the identity of a disk.
var (
	// ErrOtherDisk means that the disk is not the one backed up before.
	ErrOtherDisk = errors.New("this is not the disk that was backed up before")
	// ErrShrunk means that the disk is smaller than it was.
	ErrShrunk = errors.New("the disk is smaller than it was")
)

// lineage is the place of a new point among the disks that its volume had.
type lineage struct {
	id     string // empty for the volume's first
	begins bool   // with the new point, whose ID becomes id
	reason string // why the lineage begins
	// other means that the points to build on are of another disk: no list of changes is
	// relative to them.
	other    bool
	identity *blocktree.DiskIdentity
}

// chooseLineage checks whether this is the disk that was backed up before, and refuses
// another one or begins a lineage for it.
func (r *run) chooseLineage(ctx context.Context, cat *points.Catalog) error {
	l := &r.lineage
	var err error
	if l.identity, err = identify(r.opt.Disk, r.opt.Disk.Size()); err != nil {
		// It is read again as data; read errors are handled there.
		r.repo.Log().DebugContext(ctx, "cannot tell which disk this is", "volume", r.opt.Volume.String(), "error", err)
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
		shrunk = fmt.Sprintf("it has %s, and had %s in %s", bytesize.Exact(size), bytesize.Exact(ref.Size), ref.Name())
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
			"give --new-disk: it begins a new lineage of the volume, and prune counts the points of the old disk separately",
			ErrOtherDisk, r.opt.Volume, why, ref.Name())
	}
	if was != nil && l.identity != nil {
		r.notes = append(r.notes, was.Changes(l.identity)...)
	}
	return nil
}

// reference returns the point whose disk this one should be: the newest of the volume, or of
// the lineage of the requested parent; nil for the volume's first backup.
func (r *run) reference(cat *points.Catalog) (*points.Point, error) {
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
	of := cat.OfLineage(v, p.Lineage)
	return of[len(of)-1], nil
}

// known returns the identity and the claim of the disk of a point, from its record or the
// disk itself; nil if the point cannot be read.
func (r *run) known(ctx context.Context, p *points.Point) (*blocktree.DiskIdentity, *blocktree.Claim, error) {
	rec, err := points.LoadRecord(ctx, r.repo, p)
	if err == nil {
		var id *blocktree.DiskIdentity
		if id, err = identityOf(ctx, r.repo, p, rec); err == nil {
			return id, rec.Claim, nil
		}
	}
	if ctx.Err() != nil || errors.Is(err, repository.ErrStorageFailed) {
		return nil, nil, err
	}
	r.repo.Log().WarnContext(ctx, "cannot tell whether this is the disk that was backed up before", "point", p.Name(), "error", err)
	if rec != nil {
		return nil, rec.Claim, nil
	}
	return nil, nil, nil
}

// differs returns why the disk is not the earlier one, or "" if it may be. Between two claims
// of Kubernetes the UIDs decide; the serial number does not count, since the volume that is
// read is made from a snapshot.
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

// otherLineage leaves the lineage of ref, for an earlier one of this disk or a new one.
func (r *run) otherLineage(ctx context.Context, cat *points.Catalog, ref *points.Point, why string) error {
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
			r.notes = append(r.notes, fmt.Sprintf("this disk continues its own lineage, of which %s was the newest", p.Name()))
			return nil
		}
	}
	l.id, l.begins, l.other, l.reason = "", true, true, why
	r.notes = append(r.notes, "begins a new lineage of the volume: "+why)
	r.repo.Log().InfoContext(ctx, "a new lineage begins", "volume", r.opt.Volume.String(), "reason", why, "before", ref.Name())
	if _, none := r.opt.Source.(cbt.Compare); r.opt.Source != nil && !none && !r.opt.Full {
		// Its list is relative to the disk before.
		r.opt.Source = nil
		if len(r.opt.Fallback) > 0 {
			r.opt.Source, r.opt.Fallback = r.opt.Fallback[0], r.opt.Fallback[1:]
		}
	}
	return nil
}

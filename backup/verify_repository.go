package backup

import (
	"context"
	"fmt"
	"slices"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// lookForLoss finds what the listed points cannot show: points that are missing from the
// list.
func (rep *VerifyReport) lookForLoss(ctx context.Context, r *repository.Repository, cat *points.Catalog) (err error) {
	if rep.Missing, err = MissingPoints(ctx, r, cat); err != nil || !r.Direct() {
		return err
	}
	rep.Unknown, err = r.UnknownPacks(ctx)
	return err
}

// repositoryErr reports what is wrong with the repository itself while the listed points are
// intact; then they need no pack that is in no index.
func (rep *VerifyReport) repositoryErr() error {
	const next = "the points that are listed are whole; put back what is lost from a copy of the storage, or run 'varve repo repair'"
	switch {
	case len(rep.Unreadable) > 0:
		u := rep.Unreadable[0]
		return fmt.Errorf("%w: pack %s, which holds a part of the list of recovery points, cannot be read (%s), so points may be missing; %s", points.ErrDamaged, u.Pack, u.Reason, next)
	case len(rep.Missing) > 0:
		return fmt.Errorf("%w: %v (%d such points); %s", points.ErrDamaged, rep.Missing[0], len(rep.Missing), next)
	}
	i := slices.IndexFunc(rep.Unknown, func(u repository.UnknownPack) bool { return u.MayListPoints() })
	if i < 0 {
		return nil
	}
	return fmt.Errorf("%w: no index knows pack %s, which may list recovery points (%d packs in no index): an index blob is lost; %s",
		points.ErrDamaged, rep.Unknown[i].Pack, len(rep.Unknown), next)
}

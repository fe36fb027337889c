package points

import (
	"context"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// Count returns the number of Varve's recovery points in a repository, and of their volumes.
// It reads labels only, so it is much cheaper than List; points whose labels a migration
// dropped are not counted.
func Count(ctx context.Context, r *repository.Repository) (points, volumes int64, err error) {
	infos, err := r.ListSnapshots(ctx, nil)
	if err != nil {
		return 0, 0, err
	}
	ids, sources := map[string]bool{}, map[repository.Source]bool{}
	for _, info := range infos {
		// While a pin changes a point has two manifests.
		if id := info.Tags[TagID]; info.Tags[tagFormat] != "" && blocktree.ValidID(id) && !ids[id] {
			ids[id], sources[info.Source] = true, true
		}
	}
	return int64(len(ids)), int64(len(sources)), nil
}

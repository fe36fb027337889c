package backup

import (
	"context"

	"github.com/varve-io/varve/backup/repository"
)

// Count returns how many recovery points of Varve's a repository holds, and of how many
// volumes. It reads labels only, so that it is cheap where List is not; points whose
// labels a migration dropped are not counted.
func Count(ctx context.Context, r *repository.Repository) (points, volumes int64, err error) {
	infos, err := r.ListSnapshots(ctx, nil)
	if err != nil {
		return 0, 0, err
	}
	ids, sources := map[string]bool{}, map[repository.Source]bool{}
	for _, info := range infos {
		// While a pin is changed a point has two manifests for a moment.
		if id := info.Tags[tagID]; info.Tags[tagFormat] != "" && id != "" && !ids[id] {
			ids[id], sources[info.Source] = true, true
		}
	}

	return int64(len(ids)), int64(len(sources)), nil
}

package cbttest

import (
	"context"

	"github.com/varve-io/varve/backup/cbt"
)

// Named is a source whose listings do not name their volume, with the name that a user gives
// (--volume-handle).
func Named(s cbt.Source, volume string) cbt.Source { return named{s, volume} }

type named struct {
	cbt.Source
	volume string
}

func (n named) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	rep, err := n.Source.Changes(ctx, req, emit)
	rep.VolumeHandle = n.volume
	return rep, err
}

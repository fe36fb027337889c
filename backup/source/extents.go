package source

import (
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/backup/cbt"
)

// Extents is a list of changed blocks that a user passes.
type Extents struct {
	List io.Reader
	// Format is auto, varve, rbd, nbdinfo, qemu-img or thin_delta; empty is auto.
	Format string
	// Base and Target name the states of a list that does not name them itself.
	Base, Target string
}

// thinDelta is the format of thin_delta, which is no JSON.
const thinDelta = "thin_delta"

// ErrExtents means that a list of extents was described wrongly.
var ErrExtents = errors.New("--extents")

// Source is the list as a source of changes. It reads the first bytes of the list where the
// format is to be recognised. Errors: ErrExtents.
func (x Extents) Source() (cbt.Source, error) {
	tool, list := cbt.ExtentsTool(x.Format), x.List
	switch x.Format {
	case "auto", "":
		tool, list = cbt.DetectExtents(list)
	case "varve":
		tool = ""
	case string(cbt.RBDDiff), string(cbt.NBDInfo), string(cbt.QEMUImg):
	case thinDelta:
		if x.Base == "" || x.Target == "" {
			return nil, fmt.Errorf("%w: thin_delta does not name the snapshots that it compares: give --extents-base ID and --extents-target ID", ErrExtents)
		}
		return &cbt.ThinDelta{Base: x.Base, Target: x.Target, List: list}, nil
	default:
		return nil, fmt.Errorf("%w-format is auto, varve, rbd, nbdinfo, qemu-img or thin_delta, not %q", ErrExtents, x.Format)
	}
	if tool == "" {
		if x.Base != "" || x.Target != "" {
			return nil, fmt.Errorf("%w-base and --extents-target are for the list of a tool; this one names its states itself", ErrExtents)
		}
		return cbt.NewExtents(list), nil
	}
	if x.Target == "" {
		return nil, fmt.Errorf("%w: the list is output of %s, which does not name the states: give --extents-target ID, and --extents-base ID for a list of changes", ErrExtents, tool)
	}
	return &cbt.ToolExtents{Tool: tool, Base: x.Base, Target: x.Target, List: list}, nil
}

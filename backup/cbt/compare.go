package cbt

import "context"

// Compare is the source that needs no tracking: it reports the whole disk and lets
// the engine find the difference by content. It serves any base, and none.
type Compare struct{}

var _ Source = Compare{}

// Changes emits one extent over the whole disk, or nothing for a disk of size 0.
func (Compare) Changes(ctx context.Context, req Request, emit func(Extent) error) (Report, error) {
	if err := ctx.Err(); err != nil {
		return Report{}, err
	}

	if req.Size < 0 {
		return Report{}, &Error{Source: "compare", Kind: ErrOutOfRange, Detail: "the size of the disk is negative"}
	}

	if req.Size > 0 {
		if err := emit(Extent{Length: req.Size}); err != nil {
			return Report{}, err
		}
	}

	report := Report{Source: "compare", Size: req.Size, Reported: req.Size}
	if req.Base != nil {
		report.BaseChangeID = req.Base.ChangeID
		report.VolumeHandle = req.Base.VolumeHandle
	}
	return report, nil
}

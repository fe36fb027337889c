package source

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/nbddisk"
)

// momentary is a disk whose bytes are right only as long as failed is not set.
type momentary struct {
	*nbddisk.Disk

	failed *atomic.Pointer[error]
}

// ReadAt fails with what ended the moment, rather than with how it shows.
func (d momentary) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Disk.ReadAt(p, off)
	if why := d.failed.Load(); why != nil {
		return 0, *why
	}
	return n, err
}

// momentaryChanges are changes of such a disk: they fail with the same.
type momentaryChanges struct {
	cbt.Source

	failed *atomic.Pointer[error]
}

// Changes implements cbt.Source.
func (c momentaryChanges) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	rep, err := c.Source.Changes(ctx, req, emit)
	if why := c.failed.Load(); why != nil {
		return cbt.Report{}, *why
	}
	return rep, err
}

// momentOf is a disk with the sources of its changes, best first.
func momentOf(d *nbddisk.Disk, failed *atomic.Pointer[error], sources ...cbt.Source) (Bytes, []cbt.Source) {
	for i := range sources {
		sources[i] = momentaryChanges{sources[i], failed}
	}
	return momentary{d, failed}, sources
}

// ofSize is a disk that is not read.
type ofSize int64

var _ Bytes = ofSize(0)

func (s ofSize) Size() int64      { return int64(s) }
func (s ofSize) CheckSize() error { return nil }
func (s ofSize) ReadAt([]byte, int64) (int, error) {
	return 0, fmt.Errorf("the disk was opened to be looked at: %w", io.ErrUnexpectedEOF)
}

// bitmapOf is the bitmap that began with the recorded base, if it can be used.
type bitmapOf struct {
	old, why string
	changes  cbt.Source
}

// Changes implements cbt.Source.
func (b *bitmapOf) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	switch {
	case req.Base == nil, req.Base.ChangeID == "" && b.old == "": // it was never tracked: no fallback
		return cbt.Report{}, &cbt.Error{Source: bitmapSource, Kind: cbt.ErrNoBase}
	case b.old == "" && b.why == "":
		return cbt.Report{}, &cbt.Error{Source: bitmapSource, Kind: cbt.ErrBaseMismatch, Reason: cbt.ReasonBaseMismatch,
			Detail: fmt.Sprintf("the changes since %s were not asked for", req.Base.ChangeID)}
	case b.old == "":
		return cbt.Report{}, &cbt.Error{Source: bitmapSource, Kind: cbt.ErrUnavailable, Reason: cbt.ReasonFailedPrecondition, Detail: b.why}
	}
	return b.changes.Changes(ctx, req, emit)
}

// How often the watch looks.
const (
	watchRoom = 100 * time.Millisecond
	watchJobs = 20 // times watchRoom
)

// watchMoment checks the room in the scratch directory, and the jobs, until ctx ends or
// something is wrong.
func watchMoment(ctx context.Context, room func() error, jobs func(context.Context) error, fail func(error)) {
	tick := time.NewTicker(watchRoom)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := room()
		if err == nil && n%watchJobs == 0 {
			err = jobs(ctx)
		}
		if err != nil && ctx.Err() == nil {
			fail(err)
			return
		}
	}
}

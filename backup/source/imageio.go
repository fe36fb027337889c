package source

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/varve-io/varve/backup/imageio"
)

// imageioRetry is how long a request to an imageio service is repeated.
const imageioRetry = time.Minute

// transfer is a disk that oVirt offers for one transfer.
type transfer struct {
	disk *imageio.Disk
	opt  Options
}

func openImageio(ctx context.Context, uri string, opt Options) (Session, error) {
	t, ca, err := imageio.Locate(uri)
	switch {
	case errors.Is(err, imageio.ErrURL):
		return nil, fmt.Errorf("%w: %w", ErrURI, err)
	case err != nil:
		return nil, err
	case opt.Track:
		return nil, fmt.Errorf("%s: %w: oVirt keeps the checkpoints; name the one that the backup made with --change-id", uri, ErrNoTracking)
	case opt.Bitmap != "":
		return nil, fmt.Errorf("%w: %s: --bitmap is for NBD exports; name the checkpoint that the backup in oVirt was started from with --base-change-id", ErrURI, uri)
	}
	d, err := imageio.Open(ctx, t, imageio.Options{CA: ca, Retry: imageioRetry, Log: opt.log()})
	if err != nil {
		return nil, err
	}
	return &transfer{d, opt}, nil
}

// Disks is the one.
func (t *transfer) Disks() []Disk {
	d := Disk{Bytes: t.disk, Kind: "oVirt transfer", Notes: t.disk.Notes()}
	if t.opt.BaseChangeID != "" {
		d.Changes = append(d.Changes, &imageio.Dirty{Disk: t.disk, Base: t.opt.BaseChangeID, Target: t.opt.ChangeID})
	}
	d.Changes = append(d.Changes, &imageio.Allocated{Disk: t.disk, Target: t.opt.ChangeID})
	return []Disk{d}
}

// Check finds nothing: a transfer shows one moment as long as its ticket is valid, and a read
// with one that is not fails.
func (t *transfer) Check(context.Context) error { return nil }

// Commit has nothing to let go of: the checkpoints are oVirt's.
func (t *transfer) Commit(context.Context) error { return nil }

// Close ends the connections. The transfer is ended in oVirt, by who started it.
func (t *transfer) Close() error { return t.disk.Close() }

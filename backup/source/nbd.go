package source

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// nbdRetry is how long a lost connection to a server is tried again.
const nbdRetry = time.Minute

// nbd is an export of a server that another program runs.
type nbd struct {
	disk *nbddisk.Disk
	opt  Options
}

func openNBD(ctx context.Context, uri string, opt Options) (Session, error) {
	u, err := nbdclient.ParseURI(uri)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrURI, err)
	}
	if opt.Track {
		return nil, fmt.Errorf("%s: %w: the program that serves the export keeps its bitmaps; name one with --bitmap, and the new state with --change-id", uri, ErrNoTracking)
	}
	o := nbddisk.Options{Retry: nbdRetry}
	if opt.Bitmap != "" {
		o.Bitmaps = []string{opt.Bitmap}
	}
	d, err := nbddisk.Open(ctx, u, o)
	if err != nil {
		return nil, err
	}
	return &nbd{d, opt}, nil
}

// Disks is the one.
func (n *nbd) Disks() []Disk {
	d := Disk{Bytes: n.disk, Kind: "NBD export"}
	if n.opt.Bitmap != "" {
		d.Changes = append(d.Changes, &nbddisk.Bitmap{Disk: n.disk, Name: n.opt.Bitmap, Base: cmp.Or(n.opt.BaseChangeID, n.opt.Bitmap), Target: n.opt.ChangeID, Kind: bitmapSource})
	}
	d.Changes = append(d.Changes, &nbddisk.Allocated{Disk: n.disk, Target: n.opt.ChangeID, Kind: "allocation"})
	if n.disk.Size() == 0 {
		d.Changes = []cbt.Source{cbt.Compare{}}
	}
	return []Disk{d}
}

// Check finds a server that was started again with another disk, as far as samples can. What moment
// an export shows is otherwise its server's to know.
func (n *nbd) Check(context.Context) error { return n.disk.Verify() }

// Commit has nothing to let go of.
func (n *nbd) Commit(context.Context) error { return nil }

// Close ends the connections.
func (n *nbd) Close() error { return n.disk.Close() }

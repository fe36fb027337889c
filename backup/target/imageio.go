package target

import (
	"context"
	"time"

	"github.com/varve-io/varve/backup/imageio"
)

// imageioRetry is how long requests are repeated.
const imageioRetry = time.Minute

// transfer is a disk that oVirt lets be written to.
type transfer struct{ *imageio.Target }

// OpenImageio opens the disk of an upload in oVirt, of at least o.Size bytes; imageio.Locate
// says what uri is. A write that fails is repeated, with all that was written since the last
// flush.
func OpenImageio(ctx context.Context, uri string, o Options) (Target, error) {
	t, ca, err := imageio.Locate(uri)
	if err != nil {
		return nil, err
	}
	d, err := imageio.NewTarget(ctx, t, o.Size, imageio.Options{CA: ca, Retry: imageioRetry, Log: o.Log})
	if err != nil {
		return nil, err
	}
	return &transfer{d}, nil
}

// Finish closes the connections; what was written is durable since Sync. The transfer is
// finalized in oVirt, by who started it.
func (t *transfer) Finish() error { return t.Close() }

// Abort closes the connections.
func (t *transfer) Abort() error { return t.Close() }

package browse

import (
	"errors"
	"io"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs/diskfs"
)

// Damageable returns a recovery point's disk for diskfs: the error of a block that the
// repository has lost concerns that block only.
func Damageable(r io.ReaderAt) io.ReaderAt { return damageable{r} }

type damageable struct{ r io.ReaderAt }

func (d damageable) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.r.ReadAt(p, off)
	if errors.Is(err, repository.ErrContentMissing) || errors.Is(err, repository.ErrContentCorrupt) || errors.Is(err, blocktree.ErrMalformed) {
		err = &diskfs.LostError{Err: err}
	}
	return n, err
}

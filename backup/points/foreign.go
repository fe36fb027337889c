package points

import (
	"context"
	"fmt"
	"strconv"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
)

// Velero's block data mover saves a volume as a directory with one file, padded
// to whole 1 MiB blocks; the real size is in a tag.
const veleroSizeTag = "bdev-source-size"

// foreignPoint reads a snapshot of another program as a recovery point: a snapshot of a
// single file, or of a directory with a single file.
func foreignPoint(ctx context.Context, r *repository.Repository, s *repository.Snapshot, p *Point) (*Point, error) {
	if !blocktree.ValidID(s.ManifestID) { // as Kopia makes them (kopia repo/manifest)
		return nil, fmt.Errorf("snapshot %q has no manifest ID of Kopia's form", s.ManifestID)
	}
	p.ID, p.Kind, p.Foreign = s.ManifestID, "full", "kopia"
	p.Size = s.RootSize
	if p.rootDir {
		files, err := r.ReadDirectory(ctx, p.Root)
		if err != nil {
			return nil, err
		}
		if len(files) != 1 || files[0].Dir {
			return nil, errNotAPoint
		}
		p.Root, p.rootDir, p.Size = files[0].Object, false, files[0].Size
		if p.Volume.Name == "" {
			p.Volume.Name = files[0].Name
		}
	}
	if text, ok := s.Tags[veleroSizeTag]; ok {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 0 || n > p.Size {
			return nil, fmt.Errorf("snapshot %s: tag %s is %q, and its file has %s", s.ManifestID, veleroSizeTag, text, bytesize.Exact(p.Size))
		}
		p.Size, p.Foreign = n, "velero"
	}
	if p.Size > blocktree.MaxSize {
		return nil, fmt.Errorf("snapshot %s: its file has %s, and disks of more than %s are not supported",
			s.ManifestID, bytesize.Exact(p.Size), bytesize.Format(blocktree.MaxSize))
	}
	if p.Size < 0 {
		return nil, fmt.Errorf("snapshot %s: its file has a size of %s", s.ManifestID, bytesize.Exact(p.Size))
	}
	return p, nil
}

package repository

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/kopia/kopia/repo/blob/filesystem"
)

// temporaryAge is the age from which a half-written file is deleted. Its date may be from
// another machine's clock, and a write over a slow network may take hours.
const temporaryAge = 24 * time.Hour

// temporaryFile matches the file to which Kopia writes a blob before it renames it: the
// blob's file name, and random digits (kopia repo/blob/filesystem/ filesystem_storage.go,
// createTempFileWithData). A process that is killed in between leaves it, and Kopia never
// deletes it.
var temporaryFile = regexp.MustCompile(`\.f\.tmp\.[0-9a-f]{8,}$`)

// dropTemporary deletes the files that killed writes left in a repository's directory.
func (f *fullRun) dropTemporary(ctx context.Context) error {
	opt, ok := f.w.w.BlobStorage().ConnectionInfo().Config.(*filesystem.Options)
	if !ok {
		return nil
	}
	limit := f.w.r.Now().Add(-temporaryAge)
	err := filepath.WalkDir(opt.Path, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || !d.Type().IsRegular() || !temporaryFile.MatchString(d.Name()) {
			return ignoreGone(err)
		}
		info, err := d.Info()
		if err != nil || info.ModTime().After(limit) {
			return ignoreGone(err)
		}
		if err := os.Remove(path); err != nil {
			return ignoreGone(err)
		}
		f.rep.Temporary.add(info.Size())
		return nil
	})
	if err != nil {
		return fmt.Errorf("delete what killed writes left: %w", err)
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

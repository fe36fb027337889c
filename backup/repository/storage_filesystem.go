package repository

import (
	"context"
	"path/filepath"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"
)

// Filesystem keeps the repository in a directory.
type Filesystem struct {
	Path string
	// Shared lets the directory's group read and write, for programs that run as
	// different users of one group; their umask must allow it.
	Shared bool
}

func (s *Filesystem) validate() error {
	if s.Path == "" {
		return invalid("a filesystem repository needs the path of its directory")
	}
	if !filepath.IsAbs(s.Path) {
		return invalid("the path of a filesystem repository must be absolute, not %q", s.Path)
	}
	return nil
}

func (s *Filesystem) options() *filesystem.Options {
	if s.Shared {
		return &filesystem.Options{Path: s.Path, FileMode: 0o660, DirectoryMode: 0o770}
	}
	return &filesystem.Options{Path: s.Path, FileMode: 0o600, DirectoryMode: 0o700}
}

func (s *Filesystem) open(ctx context.Context, create bool) (blob.Storage, error) {
	o := s.options()
	o.Options = shardsOf(create)
	return filesystem.New(ctx, o, create)
}

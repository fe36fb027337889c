package files

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"syscall"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// state is a file in one recovery point.
type state struct {
	files *Point
	on    *volumes.Volume
	info  Info
	stat  *diskfs.Stat
	file  diskfs.File // of a regular file, else nil
	err   error       // why the file cannot be read; then nothing else is known
}

// ErrVolumes means that a path names the list of a disk's volumes, not a file.
var ErrVolumes = errors.New("this is the list of volumes")

// Version is a state of a file, which it has in the recovery points from First to Last.
type Version struct {
	First, Last *points.Point
	Points      int
	File        *Info // nil if the file does not exist or cannot be read
	Err         error // why the file cannot be read, or compared with the point before
}

// History groups points of one volume, oldest first, by the states of a file: by its
// metadata, and by its content where the disk changed below it. Damage of the file is
// recorded in its version; another error ends the history.
func History(ctx context.Context, held *disks.Disks, pts []*points.Point, name string, opt diskfs.Options, log *slog.Logger) ([]Version, error) {
	list := []Version{}
	var before *state
	defer func() { before.close() }()
	for i, p := range pts {
		now, err := openState(ctx, held, p, name, opt, log)
		if err != nil {
			return nil, err
		}
		log = slog.New(slog.DiscardHandler) // notes about the volume are logged once
		same, damage := i > 0, now.err
		if same {
			if same, err = sameState(ctx, before, now); err != nil {
				err = fmt.Errorf("compare %s with %s: %w", p.Name(), pts[i-1].Name(), err)
				if !diskfs.Local(err) {
					now.close()
					return nil, err
				}
				damage = err
			}
		}
		if same {
			last := &list[len(list)-1]
			last.Last, last.Points = p, last.Points+1
		} else {
			v := Version{First: p, Last: p, Points: 1, Err: damage}
			if now.stat != nil {
				v.File = &now.info
			}
			list = append(list, v)
		}
		before.close()
		before = now
	}
	return list, nil
}

func (s *state) close() {
	if s == nil {
		return
	}
	if s.file != nil {
		_ = s.file.Close() // was only read
	}
	s.files.Close()
}

// openState opens the file in one point; stat is nil if the file does not exist.
func openState(ctx context.Context, held *disks.Disks, p *points.Point, name string, opt diskfs.Options, log *slog.Logger) (s *state, err error) {
	files, err := Open(ctx, held, p, log)
	if err != nil {
		return nil, err
	}
	s = &state{files: files}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	fsys, inside, err := files.Find(name, opt)
	if err != nil {
		return nil, err
	}
	if fsys == nil {
		return nil, fmt.Errorf("%s: %w", name, ErrVolumes)
	}
	s.on, _ = files.Volume(name)
	e, err := browse.Lstat(fsys, inside)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return s, nil
	}
	if err == nil {
		s.info, err = Describe(e)
	}
	if err == nil && e.Info.Mode().IsRegular() {
		s.file, err = e.Open()
	}
	if diskfs.Local(err) {
		s.err = err
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	s.stat = e.Stat
	return s, nil
}

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path"
	"strings"
	"syscall"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/disk"
)

// fileVersion is what "varve ls --versions -o json" prints: a state of a file, and the
// recovery points from First to Last that have it.
type fileVersion struct {
	First  string    `json:"first"`
	Last   string    `json:"last"`
	Points int       `json:"points"`
	File   *fileInfo `json:"file,omitempty"`  // nil where there is no such file, or with an error
	Error  string    `json:"error,omitempty"` // why the file cannot be read, or not compared with the point before
	err    error
}

// fileState is a file in one recovery point.
type fileState struct {
	files *pointFiles
	on    *disk.Volume
	info  fileInfo
	stat  *diskfs.Stat
	file  diskfs.File // of a regular file, else nil
	err   error       // why the file cannot be read; nothing else is known then
}

func (a *app) versions(ctx context.Context, arg string, stale bool) (err error) {
	i := strings.Index(arg, ":/")
	if i < 0 {
		return usagef("--versions wants VOLUME:/PATH, for example shop/db:/etc/fstab")
	}
	name := path.Clean(arg[i+1:])
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	cat, err := backup.List(ctx, repo, backup.ListOptions{})
	if err != nil {
		return err
	}
	names := a.names(repo, cat)
	v, err := volumeNamed(names, arg[:i])
	if at := strings.IndexByte(arg[:i], '@'); err != nil && at > 0 {
		return usagef("--versions looks through all recovery points of a volume: name it without one, %s%s", arg[:at], arg[i:])
	}
	if err != nil {
		return fmt.Errorf("--versions: %w", err)
	}
	points := cat.Of(v)
	if len(points) == 0 {
		return names.NoPoints(v)
	}
	list, err := fileVersions(ctx, repo, points, name, stale, a.log)
	if err != nil {
		return err
	}
	if len(list) == 1 && list[0].File == nil && list[0].Error == "" {
		return fmt.Errorf("%s: %w", arg, fs.ErrNotExist) // in no point
	}
	report := &damageReport{app: a, ctx: ctx}
	for _, v := range list {
		if v.err != nil {
			if err := report.fail(v.First, relative(name), v.err); err != nil {
				return err
			}
		}
	}
	return errors.Join(report.err(), a.print(list, func(t *table) {
		t.row("FIRST", "LAST", "POINTS", "MODE", "UID", "GID", "SIZE", "MODIFIED")
		for _, v := range list {
			if v.File == nil && v.Error != "" {
				t.row(v.First, v.Last, v.Points, "(cannot be read)", "", "", "", "")
				continue
			}
			if v.File == nil {
				t.row(v.First, v.Last, v.Points, "(no such file)", "", "", "", "")
				continue
			}
			t.row(v.First, v.Last, v.Points, v.File.Mode, v.File.UID, v.File.GID, v.File.Size, t.time(v.File.ModTime))
		}
	}))
}

// fileVersions groups points, oldest first, by the states of a file.
func fileVersions(ctx context.Context, repo *repository.Repository, points []*backup.Point, name string, stale bool, log *slog.Logger) ([]fileVersion, error) {
	list := []fileVersion{}
	var before *fileState
	defer func() { before.close() }()
	for i, p := range points {
		now, err := openState(ctx, repo, p, name, stale, log)
		if err != nil {
			return nil, err
		}
		log = slog.New(slog.DiscardHandler) // what is to be known of the volume is said once
		same, damage := i > 0, now.err
		if same {
			if same, err = sameState(ctx, before, now); err != nil {
				err = fmt.Errorf("compare %s with %s: %w", p.Name(), points[i-1].Name(), err)
				if !diskfs.Local(err) {
					now.close()
					return nil, err
				}
				damage = err
			}
		}
		if same {
			last := &list[len(list)-1]
			last.Last, last.Points = p.Name(), last.Points+1
		} else {
			v := fileVersion{First: p.Name(), Last: p.Name(), Points: 1}
			if now.stat != nil {
				v.File = &now.info
			}
			if damage != nil {
				v.Error, v.err = message(damage), damage
			}
			list = append(list, v)
		}
		before.close()
		before = now
	}
	return list, nil
}

func (s *fileState) close() {
	if s == nil {
		return
	}
	if s.file != nil {
		_ = s.file.Close() // was only read
	}
	s.files.Close()
}

// openState opens the file in one point; without a stat where it does not exist.
func openState(ctx context.Context, repo *repository.Repository, p *backup.Point, name string, stale bool, log *slog.Logger) (s *fileState, err error) {
	files, err := openPointFiles(ctx, repo, image.NewCache(versionCacheBytes), p, log)
	if err != nil {
		return nil, err
	}
	s = &fileState{files: files}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	fsys, inside, err := files.find(name, diskfs.Options{Stale: stale})
	if err != nil {
		return nil, err
	}
	if fsys == nil {
		return nil, usagef("--versions: %s is the list of volumes", name)
	}
	s.on, _ = files.volume(name)
	e, err := browse.Lstat(fsys, inside)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return s, nil
	}
	if err == nil {
		s.info, err = describe(e)
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

// versionCacheBytes bounds what is kept of each of the two points compared.
const versionCacheBytes = 64 << 20

// sameState compares a file in two points: metadata first, then content where the
// disk changed below it.
func sameState(ctx context.Context, a, b *fileState) (bool, error) {
	if a.err != nil || b.err != nil {
		return a.err != nil && b.err != nil && a.err.Error() == b.err.Error(), nil
	}
	if a.stat == nil || b.stat == nil {
		return a.stat == b.stat, nil
	}
	x, y := a.stat, b.stat
	if a.info.Mode != b.info.Mode || a.info.Target != b.info.Target || x.UID != y.UID || x.GID != y.GID || x.Size != y.Size ||
		!x.Mtime.Equal(y.Mtime) || !x.Ctime.Equal(y.Ctime) || x.Major != y.Major || x.Minor != y.Minor {
		return false, nil
	}
	return sameContent(ctx, a, b)
}

// sameContent compares what two regular files of one size hold, where the disk changed
// below; files of other kinds have no content.
func sameContent(ctx context.Context, a, b *fileState) (bool, error) {
	if a.file == nil || b.file == nil {
		return (a.file == nil) == (b.file == nil), nil
	}
	// What is data in either is compared, unless the disk says that it did not change.
	for _, s := range []*fileState{b, a} {
		for off := int64(0); ; {
			e, err := s.file.NextData(off)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return false, err //nolint:wrapcheck // says what is wrong
			}
			off = e.Offset + e.Length
			ranges, err := suspects(ctx, a, b, e)
			if err != nil {
				return false, err
			}
			for _, r := range ranges {
				if same, err := equalBytes(ctx, a.file, b.file, r.Offset, r.Length); err != nil || !same {
					return false, err
				}
			}
		}
	}
	return true, nil
}

// suspects lists the ranges of the file, within one that is data, that may differ: what was
// written on the disk between the points, or all where the two do not lie at the same place.
func suspects(ctx context.Context, a, b *fileState, e diskfs.Extent) ([]diskfs.Extent, error) {
	all := []diskfs.Extent{e}
	if e.Device < 0 {
		return all, nil
	}
	for _, s := range []*fileState{a, b} {
		for off := e.Offset; off < e.Offset+e.Length; {
			x, err := s.file.NextData(off)
			if err != nil || x.Offset != off || x.Device != e.Device+off-e.Offset {
				return all, nil //nolint:nilerr // the comparison of bytes meets the error again
			}
			off += x.Length
		}
	}
	var list []diskfs.Extent
	// The last block of a file may be cut off at the volume's end by a hostile image.
	for off, end := e.Device, min(e.Device+e.Length, a.on.Size, b.on.Size); off < end; {
		was, n := a.on.Locate(off)
		at, m := b.on.Locate(off)
		n = min(n, m, end-off)
		if n <= 0 || at != was || at+n > min(a.files.img.Size(), b.files.img.Size()) {
			return all, nil
		}
		err := b.files.img.ChangedSince(ctx, a.files.img, at, n, func(start, length int64, changed bool) error {
			if changed {
				list = append(list, diskfs.Extent{Offset: e.Offset + off - e.Device + start - at, Length: length})
			}
			return nil
		})
		if err != nil {
			return nil, err //nolint:wrapcheck // names the place
		}
		off += n
	}
	return list, nil
}

func equalBytes(ctx context.Context, a, b io.ReaderAt, off, length int64) (bool, error) {
	const unit = 1 << 20
	x, y := make([]byte, min(unit, length)), make([]byte, min(unit, length))
	for end := off + length; off < end; off += unit {
		if err := ctx.Err(); err != nil {
			return false, err //nolint:wrapcheck // cancelled
		}
		n := int(min(unit, end-off))
		for _, r := range []struct {
			r io.ReaderAt
			p []byte
		}{{a, x[:n]}, {b, y[:n]}} {
			if _, err := r.r.ReadAt(r.p, off); err != nil && !errors.Is(err, io.EOF) {
				return false, err //nolint:wrapcheck // names the place
			}
		}
		if !bytes.Equal(x[:n], y[:n]) {
			return false, nil
		}
	}
	return true, nil
}

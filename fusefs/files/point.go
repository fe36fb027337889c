package files

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"path"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// Point gives access to the files inside one recovery point. It is not safe for concurrent
// use.
type Point struct {
	point *points.Point
	held  *disks.Disk
	disk  *volumes.Disk
	log   *slog.Logger
	noted []*volumes.Volume // whose notes were logged
}

// Close releases the recovery point.
func (f *Point) Close() { f.held.Release() }

// Open opens the files of a recovery point, until Close. The log, if not nil, gets notes
// about volumes.
func Open(ctx context.Context, held *disks.Disks, p *points.Point, log *slog.Logger) (*Point, error) {
	d, err := held.Hold(ctx, p)
	if err != nil {
		return nil, err
	}
	layout, err := volumes.Open(browse.Damageable(d.Image()), d.Size())
	if err != nil {
		d.Release()
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Point{point: p, held: d, disk: layout, log: log}, nil
}

// Point returns the recovery point.
func (f *Point) Point() *points.Point { return f.point }

// Name returns the recovery point's name.
func (f *Point) Name() string { return f.point.Name() }

// Disk returns what the disk holds: its partitions and volumes.
func (f *Point) Disk() *volumes.Disk { return f.disk }

// whole returns the only volume of a disk without partitions, nil otherwise.
func (f *Point) whole() *volumes.Volume {
	if f.disk.Table == nil && len(f.disk.Volumes) == 1 && f.disk.Volumes[0].Name == "" {
		return f.disk.Volumes[0]
	}
	return nil
}

// Find opens the file system of an absolute path and returns the path within it, in diskfs's
// form. On a disk with partitions or logical volumes the first elements name one:
// /p1/etc/fstab, /vg/root/etc/fstab. fsys is nil for the list of volumes itself.
func (f *Point) Find(name string, opt diskfs.Options) (fsys diskfs.FileSystem, inside string, err error) {
	v, inside := f.Volume(name)
	if v != nil {
		fsys, err := f.open(v, opt)
		return fsys, inside, f.named(v, err)
	}
	if err := f.disk.Nothing(); err != nil {
		return nil, "", fmt.Errorf("%s: %w", f.point.Name(), err)
	}
	if name == "/" {
		return nil, ".", nil
	}
	return nil, "", fmt.Errorf("%s has no volume %s: it holds %s", f.point.Name(), name, strings.Join(f.VolumeNames(), ", "))
}

// open opens a volume's file system, and logs its note once.
func (f *Point) open(v *volumes.Volume, opt diskfs.Options) (diskfs.FileSystem, error) {
	fsys, err := v.Open(opt)
	if err == nil && v.Note != "" && !slices.Contains(f.noted, v) {
		f.noted = append(f.noted, v)
		f.log.Warn("this volume is "+v.Note, "point", f.point.Name(), "volume", v.Name)
	}
	return fsys, err
}

// Volume returns the volume of an absolute path, nil if there is none, and the path within
// it.
func (f *Point) Volume(name string) (*volumes.Volume, string) {
	if v := f.whole(); v != nil {
		return v, Relative(name)
	}
	for _, v := range f.disk.Volumes {
		rest, ok := strings.CutPrefix(name, "/"+v.Name)
		if v.Name != "" && ok && (rest == "" || rest[0] == '/') {
			return v, Relative(rest)
		}
	}
	return nil, ""
}

// VolumeNames lists the volumes as users name them, each with its content.
func (f *Point) VolumeNames() []string {
	var names []string
	for _, v := range f.disk.Volumes {
		kind := v.Type
		if kind == "" {
			kind = "unknown"
		}
		names = append(names, fmt.Sprintf("/%s (%s)", v.Name, kind))
	}
	return names
}

func (f *Point) named(v *volumes.Volume, err error) error {
	if err == nil {
		return nil
	}
	if v.Name != "" {
		return fmt.Errorf("%s, volume %s: %w", f.point.Name(), v.Name, err)
	}
	return fmt.Errorf("%s: %w", f.point.Name(), err)
}

// Relative returns a path in diskfs's form: without the leading slash, "." for the root.
func Relative(name string) string {
	if name = strings.Trim(path.Clean("/"+name), "/"); name == "" {
		return "."
	}
	return name
}

// Explain adds to an error the point, and names the file as users do.
func (f *Point) Explain(err error) error {
	name := f.point.Name()
	if path, ok := err.(*fs.PathError); ok { //nolint:errorlint // one within another error is part of its text
		return fmt.Errorf("%s:%s: %w", name, Rooted(path.Path), path.Err)
	}
	return fmt.Errorf("%s: %w", name, err)
}

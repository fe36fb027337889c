package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/disk"
)

// fileCacheBytes bounds the decoded blocks that a command which reads files
// keeps: metadata is read again and again, content once.
const fileCacheBytes = 128 << 20

// listCacheBytes is that of commands that only list: they read metadata as it lies on the
// disk, so that little of it is read again.
const listCacheBytes = 16 << 20

// listMemory is what a command that only lists should stay within: beyond it the garbage
// is collected more often.
const listMemory = 64 << 20

// pointFiles is the files inside one recovery point.
type pointFiles struct {
	point *backup.Point
	disk  *disk.Disk
	img   *image.Image
	cache *image.Cache
	log   *slog.Logger
	noted []*disk.Volume // whose notes were printed
}

func (f *pointFiles) Close() { f.cache.Close() }

// splitPointPath reads POINT:/PATH. Both a point's name and a path may hold
// ":/" and '@', so the first cut whose left side names a point counts.
func splitPointPath(names backup.Names, arg string) (*backup.Point, string, error) {
	var first error
	for i := 0; ; {
		n := strings.Index(arg[i:], ":/")
		if n < 0 {
			break
		}
		i += n
		p, err := names.Read(arg[:i])
		if err == nil {
			return p, arg[i+1:], nil
		}
		if first == nil || errors.Is(err, backup.ErrAmbiguous) {
			first = err
		}
		i += len(":/")
	}
	if first != nil {
		return nil, "", first
	}
	p, err := names.Read(strings.TrimSuffix(arg, ":"))
	if err != nil {
		// A path without its "/": times have colons as well, so the last one counts.
		if i := strings.LastIndexByte(arg, ':'); i > 0 {
			if _, other := names.Read(arg[:i]); other == nil {
				return nil, "", usagef("%s: a path begins with /: %s:/%s", arg, arg[:i], arg[i+1:])
			}
		}
		return nil, "", fmt.Errorf("%w (files are named POINT:/PATH, for example shop/db@latest:/etc/fstab)", err)
	}
	return p, "/", nil
}

// openFiles opens the point that arg names and returns the path behind it.
func (a *app) openFiles(ctx context.Context, repo *repository.Repository, leases *holder, cacheBytes int64, arg string) (*pointFiles, string, error) {
	cat, err := backup.List(ctx, repo, backup.ListOptions{})
	if err != nil {
		return nil, "", err
	}
	p, name, err := splitPointPath(a.names(repo, cat), arg)
	if err != nil {
		return nil, "", err
	}
	if err := leases.hold(ctx, p); err != nil {
		return nil, "", err
	}
	files, err := openPointFiles(ctx, repo, image.NewCache(cacheBytes), p, leases.log)
	if err != nil {
		return nil, "", err
	}
	return files, path.Clean("/" + name), nil
}

// openPointFiles opens a point; its Close closes the cache, and so does an error.
func openPointFiles(ctx context.Context, repo *repository.Repository, cache *image.Cache, p *backup.Point, log *slog.Logger) (files *pointFiles, err error) {
	defer func() {
		if err != nil {
			cache.Close()
		}
	}()
	root, err := backup.OpenRoot(ctx, repo, p)
	if err != nil {
		return nil, err
	}
	img, err := image.Open(repo, cache, root, p.Generation)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	d, err := disk.Open(browse.Damageable(img), img.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	return &pointFiles{point: p, disk: d, img: img, cache: cache, log: log}, nil
}

// whole returns the only volume of a disk without partitions, nil otherwise.
func (f *pointFiles) whole() *disk.Volume {
	if f.disk.Table == nil && len(f.disk.Volumes) == 1 && f.disk.Volumes[0].Name == "" {
		return f.disk.Volumes[0]
	}
	return nil
}

// find opens the file system that an absolute path lies in and returns the
// path within it, as diskfs wants it. On a disk with partitions or logical
// volumes the first elements name one: /p1/etc/fstab, /vg/root/etc/fstab. fsys
// is nil for the list of volumes itself.
func (f *pointFiles) find(name string, opt diskfs.Options) (fsys diskfs.FileSystem, inside string, err error) {
	v, inside := f.volume(name)
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
	return nil, "", fmt.Errorf("%s has no volume %s: it holds %s", f.point.Name(), name, strings.Join(f.volumeNames(), ", "))
}

// open opens a volume's file system, and says once what is to be known of it.
func (f *pointFiles) open(v *disk.Volume, opt diskfs.Options) (diskfs.FileSystem, error) {
	fsys, err := v.Open(opt)
	if err == nil && v.Note != "" && !slices.Contains(f.noted, v) {
		f.noted = append(f.noted, v)
		f.log.Warn("this volume is "+v.Note, "point", f.point.Name(), "volume", v.Name)
	}
	return fsys, err //nolint:wrapcheck // the caller names the volume
}

// volume gives the volume that an absolute path lies in, nil if there is none, and the
// path within it.
func (f *pointFiles) volume(name string) (*disk.Volume, string) {
	if v := f.whole(); v != nil {
		return v, relative(name)
	}
	for _, v := range f.disk.Volumes {
		rest, ok := strings.CutPrefix(name, "/"+v.Name)
		if v.Name != "" && ok && (rest == "" || rest[0] == '/') {
			return v, relative(rest)
		}
	}
	return nil, ""
}

func (f *pointFiles) volumeNames() []string {
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

func (f *pointFiles) named(v *disk.Volume, err error) error {
	if err == nil {
		return nil
	}
	if v.Name != "" {
		return fmt.Errorf("%s, volume %s: %w", f.point.Name(), v.Name, err)
	}
	return fmt.Errorf("%s: %w", f.point.Name(), err)
}

func relative(name string) string {
	if name = strings.Trim(path.Clean("/"+name), "/"); name == "" {
		return "."
	}
	return name
}

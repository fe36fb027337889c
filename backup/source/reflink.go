package source

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/fiemap"
	"github.com/varve-io/varve/internal/bytesize"
)

// reflink is a raw image on a file system that shares blocks between files (xfs, btrfs). Each
// backup reads a clone of the image, made in an instant, and keeps it: the next one reads what
// the image does not share with it any more.
type reflink struct {
	path string
	opt  Options
	src  *disk.Source // of the clone; of the image itself if it is only looked at
	file *os.File     // the same file, for its map
	name string       // of the clone, without the folder; empty if none was made
	id   string       // the change ID of this state
	done bool
}

// errClone means that the image could not be cloned.
var errClone = errors.New("make a clone of the image")

// reflinkSource is the name of changes from reflinks in records.
const reflinkSource = "reflink"

// clonePrefix begins the names of the clones of an image, of one repository and volume.
func clonePrefix(path, prefix string) string { return "." + filepath.Base(path) + ".clone-" + prefix }

// clones are the names of the clones of an image, without the folder.
func clones(path, prefix string) (names []string, err error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasPrefix(e.Name(), clonePrefix(path, prefix)) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// resolved is the path of the file that a symbolic link leads to: clones are made beside it.
func resolved(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil && isRegular(path) {
		return real
	}
	return path
}

// openRaw opens a raw image or a device. A regular file is cloned if it is to be tracked, or
// was before.
func openRaw(path string, opt Options) (Session, error) {
	path = resolved(path)
	var before []string
	if opt.Owner != "" && isRegular(path) {
		var err error
		if before, err = clones(path, opt.bitmapPrefix()); err != nil {
			return nil, fmt.Errorf("open source: %w", err)
		}
	}
	switch {
	case !opt.Track && len(before) == 0:
		return openLocal(path, opt)
	case !isRegular(path):
		return nil, fmt.Errorf("%s: %w: a device has no place for a bitmap; leave out --track", path, ErrNoTracking)
	}
	s, err := openReflink(path, opt)
	switch {
	case errors.Is(err, errClone) && !opt.Track:
		opt.log().Warn("the image cannot be cloned; all of it is read and compared", "image", path, "error", err)
		return openLocal(path, opt)
	case errors.Is(err, fiemap.ErrNoClones):
		return nil, fmt.Errorf("%s: %w: a raw image is tracked by reflinks (xfs, btrfs): %w; leave out --track", path, ErrNoTracking, err)
	}
	return s, err
}

func openReflink(path string, opt Options) (_ Session, err error) {
	image, err := disk.Open(path, disk.Options{Live: opt.Live, Buffered: true})
	if err != nil {
		return nil, err // such as one in use
	}
	r := &reflink{path: path, opt: opt}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if opt.Inspect {
		r.src = image
		r.file, err = os.Open(path)
		return r, err
	}
	if err := errors.Join(r.clone(), image.Close()); err != nil {
		return nil, err
	}
	r.src, err = disk.Open(filepath.Join(filepath.Dir(path), r.name), disk.Options{Buffered: true})
	return r, err
}

// clone makes the clone, of the image at this moment.
func (r *reflink) clone() error {
	from, err := os.Open(r.path)
	if err != nil {
		return fmt.Errorf("open source: %w", err)
	}
	defer from.Close()
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	name := clonePrefix(r.path, r.opt.bitmapPrefix()) + hex.EncodeToString(b[:])
	to, err := os.OpenFile(filepath.Join(filepath.Dir(r.path), name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return fmt.Errorf("%w: %w", errClone, err)
	}
	r.name, r.file = name, to
	if err := errors.Join(fiemap.Clone(to, from), to.Sync()); err != nil {
		return fmt.Errorf("%w: %w", errClone, err)
	}
	r.id, err = cloneID(to)
	return err
}

// cloneID names a clone and its content: one that something else wrote to has another.
func cloneID(f *os.File) (string, error) {
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s@%d", filepath.Base(f.Name()), info.ModTime().UnixNano()), nil
}

// Disks is the one.
func (r *reflink) Disks() []Disk {
	return []Disk{{Bytes: r.src, Kind: "image file", Changes: []cbt.Source{&sharing{r}, &stored{r}}}}
}

// Check finds nothing: no other process knows the clone.
func (r *reflink) Check(context.Context) error { return nil }

// Commit removes the clones of earlier backups. What cannot be removed now, the next backup
// removes.
func (r *reflink) Commit(ctx context.Context) error {
	r.done = true
	names, err := clones(r.path, r.opt.bitmapPrefix())
	for _, name := range names {
		if name != r.name {
			err = errors.Join(err, os.Remove(filepath.Join(filepath.Dir(r.path), name)))
		}
	}
	if err != nil {
		r.opt.log().WarnContext(ctx, "a clone of an earlier backup stays beside the image; the next backup removes it", "image", r.path, "error", err)
	}
	return nil
}

// Close closes the clone, and removes it if no point refers to it.
func (r *reflink) Close() error {
	var errs []error
	if r.src != nil {
		errs = append(errs, r.src.Close())
	}
	if r.file != nil {
		errs = append(errs, r.file.Close())
	}
	if r.name != "" && !r.done {
		errs = append(errs, os.Remove(filepath.Join(filepath.Dir(r.path), r.name)))
	}
	r.src, r.file, r.name = nil, nil, ""
	return errors.Join(errs...)
}

// sharing has read what the image does not share with the clone of the base.
type sharing struct{ r *reflink }

// Changes implements cbt.Source.
func (s *sharing) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	refuse := func(kind error, reason cbt.Reason, format string, args ...any) (cbt.Report, error) {
		return cbt.Report{}, &cbt.Error{Source: reflinkSource, Kind: kind, Reason: reason, Detail: fmt.Sprintf(format, args...)}
	}
	size := s.r.src.Size()
	switch {
	case req.Base == nil:
		return refuse(cbt.ErrNoBase, "", "reflinks say what changed since a backup")
	case req.Base.ChangeID == "":
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonNoChangeID, "the parent was made without a clone of the image")
	case req.Size != size:
		return refuse(cbt.ErrSizeMismatch, "", "the image has %s, not %s", bytesize.Exact(size), bytesize.Exact(req.Size))
	}
	name, _, _ := strings.Cut(req.Base.ChangeID, "@")
	if name != filepath.Base(name) || !strings.HasPrefix(name, clonePrefix(s.r.path, s.r.opt.bitmapPrefix())) {
		return refuse(cbt.ErrBaseMismatch, cbt.ReasonBaseMismatch, "%s is no clone of %s for this repository and volume", req.Base.ChangeID, s.r.path)
	}
	base, err := os.Open(filepath.Join(filepath.Dir(s.r.path), name))
	if err != nil {
		return refuse(cbt.ErrUnavailable, cbt.ReasonNotFound, "the clone that the parent was read from: %v", err)
	}
	defer base.Close()
	info, err := base.Stat()
	if err != nil {
		return cbt.Report{}, err
	}
	if id, err := cloneID(base); err != nil || id != req.Base.ChangeID || info.Size() != req.Base.Size {
		return refuse(cbt.ErrUnavailable, cbt.ReasonFailedPrecondition, "the clone that the parent was read from, %s, was written to", base.Name())
	}
	rep := cbt.Report{Source: reflinkSource, Size: size, Exact: true, BaseChangeID: req.Base.ChangeID, TargetChangeID: s.r.id, VolumeHandle: req.Base.VolumeHandle}
	j := joiner{ctx: ctx, emit: emit}
	err = fiemap.Changed(base, info.Size(), s.r.file, size, j.add)
	return j.end(rep, err)
}

// stored has read what the image stores.
type stored struct{ r *reflink }

// Changes implements cbt.Source.
func (s *stored) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	size := s.r.src.Size()
	if req.Size != size {
		return cbt.Report{}, &cbt.Error{Source: "allocation", Kind: cbt.ErrSizeMismatch, Detail: fmt.Sprintf("the image has %s, not %s", bytesize.Exact(size), bytesize.Exact(req.Size))}
	}
	rep := cbt.Report{Source: "allocation", Size: size, Exact: true, Allocated: true, TargetChangeID: s.r.id}
	if req.Base != nil {
		rep.VolumeHandle = req.Base.VolumeHandle
	}
	j := joiner{ctx: ctx, emit: emit}
	err := fiemap.Data(s.r.file, size, func(off, length int64) error { return j.add(off, length, false) })
	return j.end(rep, err)
}

// joiner emits ranges, neighbours of one kind joined.
type joiner struct {
	ctx      context.Context
	emit     func(cbt.Extent) error
	have     cbt.Extent
	reported int64
	failed   error // of the context or of emit
}

func (j *joiner) add(off, length int64, zero bool) error {
	if j.have.Length > 0 && j.have.End() == off && j.have.Zero == zero {
		j.have.Length += length
		return nil
	}
	err := j.flush()
	j.have = cbt.Extent{Offset: off, Length: length, Zero: zero}
	return err
}

func (j *joiner) flush() error {
	if j.failed = j.ctx.Err(); j.failed != nil || j.have.Length == 0 {
		return j.failed
	}
	e := j.have
	j.have = cbt.Extent{}
	j.reported += e.Length
	j.failed = j.emit(e)
	return j.failed
}

// end completes a report, after a walk that ended with err.
func (j *joiner) end(rep cbt.Report, err error) (cbt.Report, error) {
	if err == nil {
		err = j.flush()
	}
	switch {
	case err == nil:
		rep.Reported = j.reported
		return rep, nil
	case j.failed != nil:
		return cbt.Report{}, j.failed
	}
	return cbt.Report{}, &cbt.Error{Source: rep.Source, Kind: cbt.ErrUnavailable, Reason: cbt.ReasonUnimplemented, Cause: err}
}

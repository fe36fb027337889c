package browse

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// TarOptions say how to write an archive.
type TarOptions struct {
	// Sparse keeps holes, in the form that GNU tar calls PAX 1.0; other readers may not
	// know it. Without it holes are written as zeroes.
	Sparse bool
	// Copied is called with the number of content bytes written.
	Copied func(n int64)
	// Skipped is called for sockets, which tar does not support.
	Skipped func(name string)
	// Failed, if set, is called for each file and directory that cannot be read; if it
	// returns nil the archive continues. A file that can be read in part is in the archive
	// with zeroes for the rest, and the error then has a *PartialError; any other is skipped.
	Failed func(name string, err error) error
}

// Tar writes files and all that is below them as a tar archive in the PAX format: with
// nanoseconds, extended attributes, names of any bytes, and hard links. Paths begin with the
// last element of each name.
func Tar(ctx context.Context, fsys diskfs.FileSystem, w io.Writer, names []string, opt TarOptions) error {
	t := &tarrer{ctx: ctx, out: w, w: tar.NewWriter(w), links: map[uint64]string{}, opt: opt}
	for _, name := range names {
		base := path.Base(name)
		err := Walk(ctx, fsys, name, func(e *Entry) error {
			rel := base + strings.TrimPrefix(e.Path, name)
			if name == "." {
				rel = e.Path
			}
			return t.add(e, rel)
		}, func(name string, err error) error { return t.failed(name, incomplete(name, err)) })
		if err != nil {
			return err
		}
	}
	if err := t.w.Close(); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	return nil
}

type tarrer struct {
	ctx   context.Context // of one archive
	out   io.Writer       // below w
	w     *tar.Writer
	links map[uint64]string // first names of files with several
	buf   []byte
	opt   TarOptions
}

// failed decides whether the archive continues after an error of the image.
func (t *tarrer) failed(name string, err error) error {
	if t.opt.Failed == nil || t.ctx.Err() != nil {
		return err
	}
	return t.opt.Failed(name, err)
}

func (t *tarrer) add(e *Entry, name string) error {
	st := e.Stat
	h := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(st.Mode & 0o7777),
		Uid: int(st.UID), Gid: int(st.GID), ModTime: st.Mtime, AccessTime: st.Atime, ChangeTime: st.Ctime,
		PAXRecords: map[string]string{},
	}
	first, linked := t.links[st.Ino]
	switch typ := e.Info.Mode().Type(); {
	case linked && !e.IsDir():
		h.Typeflag, h.Linkname = tar.TypeLink, first
	case typ == fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case typ == fs.ModeSymlink:
		target, err := e.ReadLink()
		if err != nil {
			return t.failed(e.Path, err)
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case typ == fs.ModeNamedPipe:
		h.Typeflag = tar.TypeFifo
	case typ == fs.ModeDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, int64(st.Major), int64(st.Minor)
	case typ == fs.ModeDevice|fs.ModeCharDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(st.Major), int64(st.Minor)
	case typ == 0:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	default:
		t.opt.Skipped(e.Path)
		return nil
	}
	if used(h) > maxRecords {
		err := t.failed(e.Path, fmt.Errorf("%s: its path is too long for an archive", e.Path))
		if err == nil && e.IsDir() {
			return fs.SkipDir // longer ones are below
		}
		return err
	}
	if h.Typeflag != tar.TypeLink {
		if err := t.attributes(e, h); err != nil {
			return err
		}
	}
	var err error
	if h.Typeflag == tar.TypeReg && h.Size > 0 {
		var in bool
		if in, err = t.content(e, h); err == nil && !in {
			return nil
		}
	} else {
		err = t.w.WriteHeader(h)
	}
	if err != nil {
		return fmt.Errorf("write archive: %s: %w", name, err)
	}
	if st.Nlink > 1 && !e.IsDir() && !linked {
		t.links[st.Ino] = name
	}
	return nil
}

// maxRecords bounds what the records of one file hold, in bytes: readers, and this writer,
// refuse those over 1 MiB.
const maxRecords = 900 << 10

// used is how much of the records the header itself takes, at most: a file with holes has its
// path twice.
func used(h *tar.Header) int { return 2*len(h.Name) + len(h.Linkname) + 4<<10 }

// attributes adds extended attributes to the header's records. Those that have no room there
// are left out and reported: the file matters more.
func (t *tarrer) attributes(e *Entry, h *tar.Header) error {
	attrs, err := e.Xattrs()
	if err != nil {
		if err := t.failed(e.Path, &PartialError{Missing: "attributes", Err: err}); err != nil {
			return err
		}
	}
	room, left := maxRecords-used(h), 0
	for _, a := range attrs {
		key, value := "SCHILY.xattr."+a.Name, string(a.Value)
		if acl, ok := aclRecords[a.Name]; ok {
			if text, ok := aclText(a.Value); ok {
				key, value = acl, text
			}
		}
		if strings.ContainsAny(key, "=\x00") { // a PAX record cannot hold a '=' in its key
			continue
		}
		size := len(record(key, value))
		if size > room {
			left++
			continue
		}
		room -= size
		h.PAXRecords[key] = value
	}
	if left == 0 {
		return nil
	}
	return t.failed(e.Path, &PartialError{
		Missing: fmt.Sprintf("%d of %d attributes", left, len(attrs)),
		Err:     errors.New("they are too large for an archive, which has room for 900 KiB of each file"),
	})
}

// content writes a regular file; false if it is skipped, since nothing of it can be read.
func (t *tarrer) content(e *Entry, h *tar.Header) (in bool, err error) {
	f, err := e.Open()
	if err == nil {
		err = readable(f, h.Size) // a written header cannot be undone
	}
	if err != nil {
		return false, t.failed(e.Path, err)
	}
	defer f.Close()
	var lost damage
	err = t.write(f, h, &lost)
	if err == nil {
		if damaged := lost.err(); damaged != nil {
			err = t.failed(e.Path, damaged)
		}
	}
	return true, err
}

// write writes the header and the content of a file.
func (t *tarrer) write(f diskfs.File, h *tar.Header, lost *damage) error {
	if t.opt.Sparse {
		data, err := dataOf(f, h.Size, lost)
		if err != nil {
			return err
		}
		if data != nil {
			return t.sparse(f, h, data, lost)
		}
		*lost = damage{} // it is counted again
	}
	if err := t.w.WriteHeader(h); err != nil {
		return err
	}
	return t.copy(t.w, f, 0, h.Size, lost)
}

// copy writes a range of a file, with zeroes for what cannot be read.
func (t *tarrer) copy(w io.Writer, f diskfs.File, off, length int64, lost *damage) error {
	if t.buf == nil {
		t.buf = make([]byte, copyUnit)
	}
	for unmapped, end := off, off+length; off < end; {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		p := t.buf[:min(int64(len(t.buf)), end-off)]
		if off < unmapped { // known to be damaged up to there
			p = p[:min(int64(len(p)), unmapped-off)]
			clear(p)
			lost.add(off, int64(len(p)), nil)
		} else {
			before := lost.bytes
			if err := salvage(f, p, off, lost); err != nil {
				return err
			}
			if lost.bytes-before == int64(len(p)) {
				unmapped = unmappedUntil(f, off+int64(len(p)), end)
			}
		}
		n, err := w.Write(p)
		t.opt.Copied(int64(n))
		if err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// unmappedUntil returns how far a file's map is damaged from off on, within end: no read is
// needed there.
func unmappedUntil(f diskfs.File, off, end int64) int64 {
	_, err := f.NextData(off)
	if err == nil || errors.Is(err, io.EOF) || !diskfs.Local(err) {
		return off
	}
	if gap := (*diskfs.MapError)(nil); errors.As(err, &gap) {
		return min(gap.End, end)
	}
	return end
}

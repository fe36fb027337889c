package browse

import (
	"archive/tar"
	"context"
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
	// Copied is told how many bytes of content were written.
	Copied func(n int64)
	// Skipped is told of sockets, which tar cannot hold.
	Skipped func(name string)
}

// Tar writes files and all that is below them as a tar archive in the PAX format:
// with nanoseconds, extended attributes and names of any bytes, hard links as such.
// Paths begin with the last element of each name.
func Tar(ctx context.Context, fsys diskfs.FileSystem, w io.Writer, names []string, opt TarOptions) error {
	t := &tarrer{ctx: ctx, fsys: fsys, out: w, w: tar.NewWriter(w), links: map[uint64]string{}, opt: opt}
	for _, name := range names {
		base := path.Base(name)
		err := Walk(ctx, fsys, name, func(e *Entry) error {
			rel := base + strings.TrimPrefix(e.Path, name)
			if name == "." {
				rel = e.Path
			}
			return t.add(e, rel)
		}, nil)
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
	ctx   context.Context //nolint:containedctx // lives for one archive
	fsys  diskfs.FileSystem
	out   io.Writer // below w
	w     *tar.Writer
	links map[uint64]string // the first names of files with several
	opt   TarOptions
}

func (t *tarrer) add(e *Entry, name string) error {
	st := e.Stat
	h := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(st.Mode & 0o7777),
		Uid: int(st.UID), Gid: int(st.GID), ModTime: st.Mtime, AccessTime: st.Atime, ChangeTime: st.Ctime,
		PAXRecords: map[string]string{},
	}
	switch e.Info.Mode().Type() {
	case fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case fs.ModeSymlink:
		target, err := t.fsys.ReadLink(e.Path)
		if err != nil {
			return err //nolint:wrapcheck // names the path itself
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case fs.ModeNamedPipe:
		h.Typeflag = tar.TypeFifo
	case fs.ModeDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, int64(st.Major), int64(st.Minor)
	case fs.ModeDevice | fs.ModeCharDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(st.Major), int64(st.Minor)
	case 0:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	default:
		t.opt.Skipped(e.Path)
		return nil
	}
	if first, ok := t.links[st.Ino]; ok {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
	} else if st.Nlink > 1 && !e.IsDir() {
		t.links[st.Ino] = name
	}
	attrs, err := t.fsys.Xattrs(e.Path)
	if err != nil {
		return err //nolint:wrapcheck // names the path itself
	}
	for _, a := range attrs {
		if key, ok := aclRecords[a.Name]; ok {
			if text, ok := aclText(a.Value); ok {
				h.PAXRecords[key] = text
				continue
			}
		}
		// What a PAX record cannot hold is a '=' in its key.
		if key := "SCHILY.xattr." + a.Name; !strings.ContainsAny(key, "=\x00") {
			h.PAXRecords[key] = string(a.Value)
		}
	}
	if h.Typeflag == tar.TypeReg && h.Size > 0 {
		err = t.content(e, h)
	} else {
		err = t.w.WriteHeader(h)
	}
	if err != nil {
		return fmt.Errorf("write archive: %s: %w", name, err)
	}
	return nil
}

// content writes a regular file.
func (t *tarrer) content(e *Entry, h *tar.Header) error {
	f, err := t.fsys.Open(e.Path)
	if err != nil {
		return err //nolint:wrapcheck // names the path itself
	}
	defer f.Close()
	if file, ok := f.(diskfs.File); ok && t.opt.Sparse {
		if data, err := dataOf(file, h.Size); err != nil || data != nil {
			if err != nil {
				return err
			}
			return t.sparse(file, h, data)
		}
	}
	if err := t.w.WriteHeader(h); err != nil {
		return err //nolint:wrapcheck // by the caller
	}
	_, err = io.Copy(t.w, reader{t.ctx, f, t.opt.Copied})
	return err //nolint:wrapcheck // by the caller
}

// reader counts, and ends when its context does.
type reader struct {
	ctx    context.Context //nolint:containedctx // lives for one file
	r      io.Reader
	copied func(int64)
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err //nolint:wrapcheck // cancelled
	}
	n, err := r.r.Read(p)
	r.copied(int64(n))
	return n, err //nolint:wrapcheck // io.EOF must stay itself
}

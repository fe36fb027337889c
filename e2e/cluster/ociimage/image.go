// Package ociimage builds container images from local files, without a container
// engine and without a base image, and writes them as OCI archives. The same files
// give the same bytes.
package ociimage

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// File is one entry of an image. Directories above it are made as needed.
type File struct {
	Path string      // inside the image
	Mode fs.FileMode // permissions; fs.ModeDir and fs.ModeSymlink choose the kind
	Data []byte
	// Source is a file to read instead of Data.
	Source string
	// Link is a symbolic link's target.
	Link string
}

// Config is an image's configuration; empty fields stay empty.
type Config struct {
	Architecture string // as in GOARCH
	Entrypoint   []string
	User         string // UID:GID
	Env          []string
	Labels       map[string]string
	Created      time.Time
	// Compress the layer, as registries require; tests do not need it.
	Compress bool
}

// Base is what every image with a static binary needs: users, a place for temporary
// files, and name service rules.
func Base() []File {
	return []File{
		{Path: "/etc/passwd", Mode: 0o644, Data: []byte("root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n")},
		{Path: "/etc/group", Mode: 0o644, Data: []byte("root:x:0:\nnobody:x:65534:\nnonroot:x:65532:\n")},
		{Path: "/etc/nsswitch.conf", Mode: 0o644, Data: []byte("hosts: files dns\n")},
		{Path: "/tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
		{Path: "/home/nonroot", Mode: fs.ModeDir | 0o755},
		{Path: "/root", Mode: fs.ModeDir | 0o700},
	}
}

// Build makes an image of one layer.
func Build(files []File, c Config) (v1.Image, error) {
	layerTar, err := layerOf(files, c.Created)
	if err != nil {
		return nil, err
	}
	level, media := gzip.NoCompression, types.OCILayer
	if c.Compress {
		level = gzip.BestCompression
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(layerTar)), nil
	}, tarball.WithCompressionLevel(level), tarball.WithMediaType(media))
	if err != nil {
		return nil, err
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	created := v1.Time{Time: c.Created.UTC()}
	img, err = mutate.Append(img, mutate.Addendum{Layer: layer, MediaType: media,
		History: v1.History{Created: created, CreatedBy: "varve ociimage"}})
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Created = "linux", c.Architecture, created
	cf.Config = v1.Config{Entrypoint: c.Entrypoint, User: c.User, Env: c.Env, Labels: c.Labels, WorkingDir: "/"}
	return mutate.ConfigFile(img, cf)
}

func layerOf(files []File, when time.Time) ([]byte, error) {
	files = slices.Clone(files)
	for i := range files {
		files[i].Path = strings.Trim(path.Clean("/"+files[i].Path), "/")
	}
	files = withParents(files)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := addFile(w, f, when); err != nil {
			return nil, fmt.Errorf("image entry /%s: %w", f.Path, err)
		}
	}
	return b.Bytes(), w.Close()
}

// withParents adds missing directories and sorts, so that a parent precedes its children
// and the order is always the same.
func withParents(files []File) []File {
	have := map[string]bool{"": true, ".": true}
	for _, f := range files {
		have[f.Path] = true
	}
	for _, f := range files {
		for d := path.Dir(f.Path); !have[d]; d = path.Dir(d) {
			have[d] = true
			files = append(files, File{Path: d, Mode: fs.ModeDir | 0o755})
		}
	}
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return files
}

func addFile(w *tar.Writer, f File, when time.Time) error {
	h := &tar.Header{Name: f.Path, Mode: int64(f.Mode.Perm()), ModTime: when, Format: tar.FormatPAX}
	if f.Mode&fs.ModeSticky != 0 {
		h.Mode |= 0o1000
	}
	switch {
	case f.Mode.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, f.Path+"/"
		return w.WriteHeader(h)
	case f.Mode&fs.ModeSymlink != 0:
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.Link, 0o777
		return w.WriteHeader(h)
	}
	data := f.Data
	if f.Source != "" {
		var err error
		if data, err = os.ReadFile(f.Source); err != nil {
			return err
		}
	}
	h.Typeflag, h.Size = tar.TypeReg, int64(len(data))
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

// WriteArchive writes an image as a tar of an OCI layout, under a name that
// containerd gives it on import.
func WriteArchive(file, name string, img v1.Image) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(file), ".oci-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	_, tag, _ := strings.Cut(path.Base(name), ":")
	if err := l.AppendImage(img, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          name,
		"org.opencontainers.image.ref.name": tag,
	})); err != nil {
		return err
	}
	tmp := filepath.Join(dir, "archive")
	f, err := os.Create(tmp)
	if err != nil {
		return err
	}
	err = errors.Join(tarLayout(f, dir), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

func tarLayout(out io.Writer, dir string) error {
	w := tar.NewWriter(out)
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error { // in lexical order
		if err != nil || e.IsDir() || e.Name() == "archive" {
			return err
		}
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: rel, Mode: 0o644, Size: int64(len(data)), Format: tar.FormatPAX}); err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	})
	return errors.Join(err, w.Close())
}

package cluster

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/varve-io/varve/e2e/cluster/ociimage"
)

const busybox = "/bin/busybox" // of the package busybox-static

func imageDir(bin string) string { return filepath.Join(filepath.Dir(bin), "images") }

// buildImages makes the images of every cluster, unless they are newer than their
// sources.
func (b Builder) buildImages(ctx context.Context, bin string) error {
	dir := imageDir(bin)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	applets, err := run(ctx, busybox, "--list")
	if err != nil {
		return err
	}
	tool := []ociimage.File{{Path: "/bin/busybox", Mode: 0o755, Source: busybox}}
	for a := range strings.FieldsSeq(applets) {
		if a != "busybox" {
			tool = append(tool, ociimage.File{Path: "/bin/" + a, Mode: fs.ModeSymlink, Link: "busybox"})
		}
	}
	for _, i := range []struct {
		file, name, source string
		files              []ociimage.File
		config             ociimage.Config
	}{
		{"pause.tar", PauseImage, filepath.Join(bin, "pause"), nil, ociimage.Config{User: "65534:65534"}},
		{"versitygw.tar", S3Image, filepath.Join(bin, "versitygw"), nil, ociimage.Config{User: "65532:65532"}},
		{"tool.tar", ToolImage, busybox, tool, ociimage.Config{Env: []string{"PATH=/bin"}}},
	} {
		archive := filepath.Join(dir, i.file)
		if newer(archive, i.source) {
			continue
		}
		if i.files == nil {
			entry := "/" + filepath.Base(i.source)
			i.files = []ociimage.File{{Path: entry, Mode: 0o755, Source: i.source}}
			i.config.Entrypoint = []string{entry}
		}
		i.config.Architecture, i.config.Created = runtime.GOARCH, time.Unix(0, 0)
		img, err := ociimage.Build(append(ociimage.Base(), i.files...), i.config)
		if err != nil {
			return err
		}
		if err := ociimage.WriteArchive(archive, i.name, img); err != nil {
			return err
		}
	}
	return nil
}

func newer(a, b string) bool {
	as, err1 := os.Stat(a)
	bs, err2 := os.Stat(b)
	return errors.Join(err1, err2) == nil && as.ModTime().After(bs.ModTime())
}

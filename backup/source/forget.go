package source

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/varve-io/varve/backup/qemu"
)

// Forget removes what Varve left on a source to track its changes, and returns what that
// was: of one repository and volume if opt.Owner is set, else all of it.
func Forget(ctx context.Context, uri string, opt Options) (removed []string, err error) {
	if err := Check(uri); err != nil {
		return nil, err
	}
	switch schemeOf(uri) {
	case "":
	case "qemu+qmp":
		return forgetQMP(ctx, uri, opt)
	case "libvirt", "libvirt+ssh", "libvirt+tls":
		return forgetLibvirt(ctx, uri, opt)
	default:
		return nil, nil // nothing is left on an export
	}
	format, err := chooseFormat(uri, opt)
	switch {
	case err != nil:
		return nil, err
	case format == qemu.Raw && isRegular(uri):
		return forgetClones(uri, opt)
	case format != qemu.QCOW2:
		return nil, nil
	}
	if err := qemu.CheckReferences(uri, format, opt.FollowChain); err != nil {
		return nil, err
	}
	return forgetImage(ctx, qemu.Host{}, uri, format, opt)
}

// forgetImage removes the bitmaps of an image.
func forgetImage(ctx context.Context, host qemu.Host, path, format string, opt Options) (removed []string, err error) {
	info, err := host.ReadInfo(ctx, path, format)
	if err != nil {
		return nil, (&image{path: path}).explain(err)
	}
	prefix := opt.forgetPrefix()
	for _, b := range info.Bitmaps {
		if !strings.HasPrefix(b.Name, prefix) {
			continue
		}
		if err := host.RemoveBitmap(ctx, path, b.Name); err != nil {
			return removed, fmt.Errorf("remove bitmap %s: %w", b.Name, (&image{path: path}).explain(err))
		}
		removed = append(removed, b.Name)
	}
	return removed, nil
}

// forgetClones removes the clones of a raw image.
func forgetClones(path string, opt Options) (removed []string, err error) {
	path = resolved(path)
	names, err := clones(path, opt.forgetPrefix())
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}
	for _, name := range names {
		if err := os.Remove(filepath.Join(filepath.Dir(path), name)); err != nil {
			return removed, fmt.Errorf("remove the clone of %s: %w", path, err)
		}
		removed = append(removed, name)
	}
	return removed, nil
}

// forgetPrefix begins the names of what is forgotten.
func (o Options) forgetPrefix() string {
	if o.Owner == "" {
		return "varve-"
	}
	return o.bitmapPrefix()
}

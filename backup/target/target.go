// Package target opens what a restore writes to, unless it is a device or a plain file of this
// machine (package disk): an NBD export, a disk in oVirt, or a disk in an image file of another
// format.
package target

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/internal/tempdir"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// Disk is what is written to; it is a backup.RestoreTarget.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	ZeroRange(off, length int64) error
	Sync() error
	Fit() error
	Empty() error
	Fresh() bool
	Size() int64
	Path() string
	Identity() string
}

// Target is an opened target. Finish or Abort ends it, once.
type Target interface {
	Disk
	// Finish makes what was written durable, and a new image appear under its name.
	Finish() error
	// Abort gives up: an image that was new is gone, another keeps what was written.
	Abort() error
}

// Options of opening a target.
type Options struct {
	// Size of the disk to be written, in bytes.
	Size int64
	// Replace lets a new image take the place of a file.
	Replace bool
	// Keep writes into an image that exists, instead of making one.
	Keep bool
	// FollowChain lets an image that exists lead to files of other folders.
	FollowChain bool
	// Log takes what went wrong without harm; nil for nothing.
	Log *slog.Logger
}

// Errors that callers decide by.
var (
	// ErrExists means that a new image would replace a file.
	ErrExists = errors.New("the target exists already")
	// ErrFormat means that an image cannot be written in this format.
	ErrFormat = errors.New("not a format that can be restored to")
)

// nbd is an export.
type nbd struct{ *nbddisk.Target }

// OpenNBD opens an export of at least o.Size bytes. Several connections are used where the
// server allows it; one that is lost ends the restore.
func OpenNBD(ctx context.Context, uri *nbdclient.URI, o Options) (Target, error) {
	t, err := nbddisk.NewTarget(ctx, uri, o.Size, false, nbddisk.Options{})
	if err != nil {
		return nil, err
	}
	return &nbd{t}, nil
}

// Finish closes the connections; what was written is durable since Sync.
func (n *nbd) Finish() error { return n.Close() }

// Abort closes the connections.
func (n *nbd) Abort() error { return n.Close() }

// image is a disk in an image file, served by a qemu-nbd of our own.
type image struct {
	*nbddisk.Target
	srv        *qemu.Server
	path, work string       // where it is to be, and where it is written; the same if it is kept
	dir        *tempdir.Dir // of a new one
	replace    bool
}

// vhdx takes whole sectors only, and the others lose nothing by them.
const sector = 512

// OpenImage makes an image file, or opens one that exists if o.Keep is set. A new one is
// written in a directory beside, and is in its place only once it is complete. What killed
// restores to the same path left goes.
func OpenImage(ctx context.Context, path, format string, o Options) (_ Target, err error) {
	switch format {
	case qemu.QCOW2, qemu.VMDK, qemu.VHDX, qemu.VDI, qemu.VPC:
	default:
		return nil, fmt.Errorf("%w: %q; it is qcow2, vmdk, vhdx, vdi, vpc or raw", ErrFormat, format)
	}
	m := &image{path: path, work: path, replace: o.Replace}
	if o.Keep {
		if err := qemu.CheckReferences(path, format, o.FollowChain); err != nil {
			return nil, err
		}
		if _, err := qemu.ReadInfo(ctx, path, format); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	} else if err := m.create(ctx, format, o.Size); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Abort())
		}
	}()
	if m.srv, err = qemu.StartNBD(qemu.Serve{Path: m.work, Format: format, Write: true, Connections: nbddisk.DefaultConnections}); err != nil {
		return nil, err
	}
	m.Target, err = nbddisk.NewTarget(ctx, m.srv.URI(), o.Size, !o.Keep, nbddisk.Options{Describe: path, Grain: sector})
	if err != nil {
		if why := m.srv.Err(); why != nil {
			err = fmt.Errorf("%s: %w", path, why)
		}
		return nil, err
	}
	return m, m.srv.Hide()
}

func (m *image) create(ctx context.Context, format string, size int64) error {
	if _, err := os.Lstat(m.path); err == nil && !m.replace {
		return fmt.Errorf("%w: %s", ErrExists, m.path)
	}
	dir, err := tempdir.Make(filepath.Dir(m.path), "."+filepath.Base(m.path)+".varve-")
	if err != nil {
		return fmt.Errorf("make target: %w", err)
	}
	m.dir, m.work = dir, filepath.Join(dir.Path(), filepath.Base(m.path)) // a vmdk names itself
	err = os.WriteFile(m.work, nil, 0o600)
	if err == nil {
		err = qemu.Create(ctx, m.work, format, (size+sector-1)/sector*sector)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("make %s: %w", m.path, err), dir.Close())
	}
	return nil
}

// Finish has qemu-nbd write what it has in memory, then gives a new image its name.
func (m *image) Finish() error {
	err := errors.Join(m.Target.Close(), m.srv.Close())
	if err == nil {
		err = syncFile(m.work)
	}
	if err != nil {
		return fmt.Errorf("close %s: %w", m.path, errors.Join(err, m.dir.Close()))
	}
	if m.work == m.path {
		return nil
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if m.replace {
		flags = 0
	}
	err = unix.Renameat2(unix.AT_FDCWD, m.work, unix.AT_FDCWD, m.path, flags)
	if errors.Is(err, unix.EINVAL) { // a file system without the flag
		err = os.Rename(m.work, m.path)
	}
	rest := m.dir.Close()
	switch {
	case errors.Is(err, unix.EEXIST):
		return errors.Join(fmt.Errorf("%w: %s appeared during the restore", ErrExists, m.path), rest)
	case err != nil:
		return errors.Join(fmt.Errorf("name %s: %w", m.path, err), rest)
	}
	return syncFile(filepath.Dir(m.path)) // an empty directory that stays, the next restore removes
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Abort ends qemu-nbd and removes an image that was new.
func (m *image) Abort() error {
	var err error
	if m.Target != nil {
		err = m.Target.Close()
	}
	switch {
	case m.work == m.path && m.srv != nil:
		return errors.Join(err, m.srv.Close())
	case m.srv != nil:
		m.srv.Abort()
	}
	return errors.Join(err, m.dir.Close())
}

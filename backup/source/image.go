package source

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// Errors of image files.
var (
	// ErrFormat means that what a file holds and what it is called, or asked for as, differ.
	ErrFormat = errors.New("the format of the image file is not clear")
	// ErrNoTracking means that an image cannot record what is written to it.
	ErrNoTracking = errors.New("the image cannot track changes")
)

// formats are the formats by the end of a file's name.
var formats = map[string]string{
	".qcow2": qemu.QCOW2, ".qcow": qemu.QCOW2, ".vmdk": qemu.VMDK, ".vhdx": qemu.VHDX, ".vdi": qemu.VDI, ".vhd": qemu.VPC, ".vpc": qemu.VPC,
}

// FormatOf is the format that a path's name stands for; empty where it stands for none.
func FormatOf(path string) string { return formats[strings.ToLower(filepath.Ext(path))] }

// chooseFormat decides what the file at path is read as. Its name and its content must
// agree, for the content may be a guest's: a raw disk on which a guest wrote the head of a
// qcow2 would have QEMU open any file that the guest names.
func chooseFormat(path string, opt Options) (string, error) {
	info, err := os.Stat(path)
	switch {
	case opt.Raw, opt.Format == qemu.Raw:
		return qemu.Raw, nil
	case opt.Format != "":
		return opt.Format, nil
	case err != nil || !info.Mode().IsRegular():
		return qemu.Raw, nil // opening it says what is wrong
	}
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("open source: %w", err)
	}
	defer f.Close()
	named := FormatOf(path)
	head, err := qemu.ReadHead(f, info.Size())
	switch {
	case err != nil:
		return "", fmt.Errorf("%s: %w", path, err)
	case head.Format == named || named == "" && head.Format == qemu.Raw:
		return head.Format, nil
	case head.Format == qemu.Raw:
		return "", fmt.Errorf("%s: %w: its name stands for %s, and it holds none; pass --raw to back up its bytes as they are", path, ErrFormat, named)
	}
	return "", fmt.Errorf("%s: %w: it begins as %s does, and its name does not say so; pass --format %s for the disk that the image holds, or --raw for its bytes as they are",
		path, ErrFormat, head.Format, head.Format)
}

// imageHost is the machine of an image file.
type imageHost interface {
	qemu() qemu.Host
	// serve starts a qemu-nbd.
	serve(ctx context.Context, s qemu.Serve) (imageServer, error)
	// stamp is another one after the file was replaced or written to.
	stamp(ctx context.Context, path string) (string, error)
}

// imageServer is a qemu-nbd of our own.
type imageServer interface {
	URI() *nbdclient.URI
	// Hide removes what is not needed once clients are connected.
	Hide() error
	// Running reports whether it runs, and holds its lock.
	Running() bool
	// Err is why it ended; nil while it runs.
	Err() error
	Close() error
}

// here is this machine.
type here struct{}

func (here) qemu() qemu.Host { return qemu.Host{} }

func (here) serve(_ context.Context, s qemu.Serve) (imageServer, error) { return qemu.StartNBD(s) }

func (here) stamp(_ context.Context, path string) (string, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	return stampOf(fi), nil
}

func stampOf(fi os.FileInfo) string {
	st, _ := fi.Sys().(*syscall.Stat_t)
	return fmt.Sprint(st.Dev, st.Ino, fi.Size(), fi.ModTime().UnixNano())
}

// image is a disk in an image file, served by a qemu-nbd of our own.
type image struct {
	path, format string
	opt          Options
	host         imageHost
	srv          imageServer
	disk         *nbddisk.Disk
	bytes        Bytes // disk, past its server where that is possible
	info         *qemu.Info
	target       string   // the bitmap that begins with this backup; empty for none
	stale        []string // bitmaps of ours that may go after it
	stamp        string
	notes        []string
	committed    bool
}

// bitmapPrefix begins the names of the bitmaps of one repository and volume.
func (o Options) bitmapPrefix() string { return "varve-" + o.Owner + "-" }

// newBitmapName is the name of a state that no other has.
func (o Options) newBitmapName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return o.bitmapPrefix() + hex.EncodeToString(b[:])
}

func openImage(ctx context.Context, path, format string, opt Options) (Session, error) {
	if err := qemu.CheckReferences(path, format, opt.FollowChain); err != nil {
		return nil, err
	}
	return openImageOf(ctx, here{}, path, format, opt)
}

// openImageOf opens an image whose references are known to be right.
func openImageOf(ctx context.Context, host imageHost, path, format string, opt Options) (_ Session, err error) {
	m := &image{path: path, format: format, opt: opt, host: host}
	if m.info, err = host.qemu().ReadInfo(ctx, path, format); err != nil {
		return nil, m.explain(err)
	}
	if m.info.Corrupt {
		m.notes = append(m.notes, "the image is marked corrupt; see 'qemu-img check'")
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	usable := m.sortBitmaps()
	if err := m.track(ctx); err != nil {
		return nil, err
	}
	if m.stamp, err = host.stamp(ctx, path); err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}
	srv, err := host.serve(ctx, qemu.Serve{Path: path, Format: format, Bitmaps: usable, Connections: nbddisk.DefaultConnections, Exclusive: format == qemu.Raw})
	if err != nil {
		return nil, m.explain(err)
	}
	m.srv = srv
	m.disk, err = nbddisk.Open(ctx, m.srv.URI(), nbddisk.Options{Bitmaps: usable, Describe: path})
	if err != nil {
		if why := m.srv.Err(); why != nil {
			err = m.explain(why)
		}
		return nil, err
	}
	if m.bytes, err = m.readRuns(ctx, m.disk); err != nil {
		return nil, err
	}
	return m, m.srv.Hide()
}

// explain says what to do about an image that a virtual machine has open.
func (m *image) explain(err error) error {
	if errors.Is(err, qemu.ErrLocked) {
		return fmt.Errorf("%s: %w; stop the machine first, or have its QEMU export the disk, and back up that nbd:// export", m.path, err)
	}
	return fmt.Errorf("%s: %w", m.path, err)
}

// sortBitmaps finds the bitmaps of ours, and returns those that can be read. Only those of
// the top file count, and qemu-img lists no others: qemu-nbd would also export one of a
// backing file, which calls clean what was written above it.
func (m *image) sortBitmaps() (usable []string) {
	for _, b := range m.info.Bitmaps {
		if !strings.HasPrefix(b.Name, m.opt.bitmapPrefix()) {
			continue
		}
		m.stale = append(m.stale, b.Name)
		if b.Recording() && !b.InUse() {
			usable = append(usable, b.Name)
		}
	}
	return usable
}

// track begins a new bitmap before anything is read: what is written from here on is of the
// next increment. A file that was tracked before stays so.
func (m *image) track(ctx context.Context) error {
	if !m.opt.Track && len(m.stale) == 0 || m.opt.Inspect {
		return nil
	}
	name := cmp.Or(m.opt.name, m.opt.newBitmapName())
	err := m.host.qemu().AddBitmap(ctx, m.path, name)
	switch {
	case err == nil:
		m.target = name
	case m.format != qemu.QCOW2:
		return fmt.Errorf("%s: %w: only qcow2 stores bitmaps, not %s; leave out --track", m.path, ErrNoTracking, m.format)
	case errors.Is(err, qemu.ErrLocked):
		return m.explain(err)
	case m.opt.Track:
		return fmt.Errorf("%s: %w: %w", m.path, ErrNoTracking, err)
	default:
		m.notes = append(m.notes, "the next backup compares the whole disk: no bitmap could be added: "+err.Error())
	}
	return nil
}

// Disks is the one.
func (m *image) Disks() []Disk {
	return []Disk{{
		Bytes: m.bytes, Kind: m.format + " image", Notes: m.notes,
		Changes: []cbt.Source{&imageBitmaps{m}, &nbddisk.Allocated{Disk: m.disk, Target: m.target, Kind: "allocation"}},
	}}
}

// Check finds an image that was written to in spite of QEMU's locks, which not every file
// system has.
func (m *image) Check(ctx context.Context) error {
	now, err := m.host.stamp(ctx, m.path)
	if err != nil {
		return fmt.Errorf("check source: %w", err)
	}
	if !m.srv.Running() {
		return fmt.Errorf("%s: the qemu-nbd that kept others from writing to it has ended: no point was made; back it up again: %w", m.path, m.srv.Err())
	}
	if now != m.stamp {
		return fmt.Errorf("%s was changed while it was read: no point was made; stop what writes to it, and back it up again", m.path)
	}
	return nil
}

// Commit removes the bitmaps of earlier backups. What cannot be removed now, the next
// backup removes.
func (m *image) Commit(ctx context.Context) error {
	m.committed = true
	if err := m.stop(); err != nil {
		return err
	}
	m.removeBitmaps(ctx, m.stale)
	return nil
}

func (m *image) removeBitmaps(ctx context.Context, names []string) {
	for _, name := range names {
		if err := m.host.qemu().RemoveBitmap(ctx, m.path, name); err != nil {
			m.opt.log().WarnContext(ctx, "a bitmap of an earlier backup stays in the image; the next backup removes it", "image", m.path, "bitmap", name, "error", err)
			return
		}
	}
}

// stop ends the server, and with it its lock on the image.
func (m *image) stop() error {
	var errs []error
	if m.disk != nil {
		errs = append(errs, m.disk.Close())
	}
	if m.srv != nil {
		errs = append(errs, m.srv.Close())
	}
	if runs, ok := m.bytes.(*runsDisk); ok {
		errs = append(errs, runs.close())
	}
	m.disk, m.srv, m.bytes = nil, nil, nil
	return errors.Join(errs...)
}

// Close ends the server. A bitmap that no point refers to goes.
func (m *image) Close() error {
	err := m.stop()
	if m.target != "" && !m.committed {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		m.removeBitmaps(ctx, []string{m.target})
		m.target = ""
	}
	return err
}

// imageBitmaps finds the bitmap that began with the base.
type imageBitmaps struct{ m *image }

// bitmapSource is the name of changes from dirty bitmaps in records.
const bitmapSource = "bitmap"

// Changes implements cbt.Source.
func (b *imageBitmaps) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	switch {
	case req.Base == nil, req.Base.ChangeID == "" && len(b.m.stale) == 0: // no fallback: it was never tracked
		return cbt.Report{}, &cbt.Error{Source: bitmapSource, Kind: cbt.ErrNoBase}
	case req.Base.ChangeID == "":
		return cbt.Report{}, &cbt.Error{Source: bitmapSource, Kind: cbt.ErrBaseMismatch, Reason: cbt.ReasonNoChangeID,
			Detail: fmt.Sprintf("the parent was made without a bitmap, and %s has one of a later backup", b.m.path)}
	}
	id := req.Base.ChangeID
	if b.m.info.DataFileRaw { // nothing would show that the disk shrank and grew again
		return cbt.Report{}, &cbt.Error{Source: bitmapSource, Kind: cbt.ErrUnavailable, Reason: cbt.ReasonFailedPrecondition,
			Detail: fmt.Sprintf("%s keeps its bytes in the raw file %s, of which the bitmap misses what another size changed", b.m.path, b.m.info.DataFile)}
	}
	gone := &cbt.Error{Source: bitmapSource, Kind: cbt.ErrUnavailable, Reason: cbt.ReasonNotFound, Detail: fmt.Sprintf("%s has no bitmap %s", b.m.path, id)}
	if len(b.m.stale) > 0 { // of other backups
		gone.Kind, gone.Reason = cbt.ErrBaseMismatch, cbt.ReasonBaseMismatch
	}
	for _, have := range b.m.info.Bitmaps {
		switch {
		case have.Name != id:
		case have.InUse():
			gone.Kind, gone.Reason = cbt.ErrUnavailable, cbt.ReasonFailedPrecondition
			gone.Detail = fmt.Sprintf("the bitmap %s of %s is inconsistent: a program that wrote to the image did not end properly", id, b.m.path)
		case !have.Recording():
			gone.Kind, gone.Reason = cbt.ErrUnavailable, cbt.ReasonFailedPrecondition
			gone.Detail = fmt.Sprintf("the bitmap %s of %s is disabled, so it missed what was written", id, b.m.path)
		case !strings.HasPrefix(id, b.m.opt.bitmapPrefix()):
			gone.Detail = fmt.Sprintf("the bitmap %s of %s belongs to another repository or volume", id, b.m.path)
		default:
			src := &nbddisk.Bitmap{Disk: b.m.disk, Name: id, Base: id, Target: b.m.target, Kind: bitmapSource}
			return src.Changes(ctx, req, emit)
		}
	}
	return cbt.Report{}, gone
}

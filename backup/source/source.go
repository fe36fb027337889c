// Package source opens what a backup reads: the bytes of disks, and what is known of
// their changes. Where both come from one place, and for several disks at one moment, as
// with a virtual machine, one session has them all. [Open] chooses by the name of the
// source; a new kind of source is an opener in a file of its own.
package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/qemu"
)

// Bytes is what a backup reads of a disk; it is a backup.Disk. ReadAt is called concurrently.
type Bytes interface {
	io.ReaderAt
	// Size is the disk's length in bytes.
	Size() int64
	// CheckSize fails when the disk changed its size since it was opened.
	CheckSize() error
}

// Disk is one disk of a session.
type Disk struct {
	// Name distinguishes the disks of one session, such as "vda"; it is empty where there is
	// only one.
	Name  string
	Bytes Bytes
	// Changes say what changed since an earlier point, the best first; with none the whole
	// disk is read and compared.
	Changes []cbt.Source
	// Kind is what the source was recognised as, such as "device".
	Kind string
	// Live is set for a disk that is written to while it is read: the point is not
	// crash-consistent.
	Live bool
	// Notes are what the user should know before the disk is read.
	Notes []string
	// Estimate, if set, is what the next backup would read, by a source that was opened to be
	// looked at and cannot list it.
	Estimate *Estimate
}

// Estimate is what a backup would read of a disk.
type Estimate struct {
	By    string // the source of changes
	Bytes int64  // at most
	Why   string // a better source is not used; empty if the best is
}

// Session is the disks of one source, at one moment. Its methods are called by one goroutine.
type Session interface {
	// Disks are there until Close.
	Disks() []Disk
	// Check fails if what was read is not of that moment any more. It is called after the last
	// read, and before a point is recorded.
	Check(ctx context.Context) error
	// Commit is called once all points are recorded: what the source kept for the points
	// before may go.
	Commit(ctx context.Context) error
	// Close ends the session, committed or not, and leaves nothing of it.
	Close() error
}

// Options of Open.
type Options struct {
	// Live accepts a disk that is in use.
	Live bool
	// Format is the format of an image file, by QEMU's name; empty to recognise it by its
	// name and content, which must agree. Raw takes the bytes of a file as they are.
	Format string
	Raw    bool
	// FollowChain lets an image lead to files of other folders, and to what is no file.
	FollowChain bool
	// Track has the source record what is written from now on, if it does not yet.
	Track bool
	// Bitmap is the dirty bitmap of an NBD export that lists what changed since the state
	// BaseChangeID, which is that of its name if empty. With an oVirt transfer BaseChangeID is
	// the checkpoint that the backup was started from. ChangeID is the name of the state that
	// is read.
	Bitmap, BaseChangeID, ChangeID string
	// Owner distinguishes what is left on a source for one repository and volume.
	Owner string
	// Inspect opens the source to be looked at: nothing is left on it.
	Inspect bool
	// Log takes what went wrong without harm; nil for nothing.
	Log *slog.Logger

	MachineOptions

	name string // of the new bitmaps; empty to choose one
}

func (o Options) log() *slog.Logger {
	if o.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return o.Log
}

// Errors that callers decide by.
var (
	// ErrScheme means that a source is of a kind that is not known.
	ErrScheme = errors.New("unknown kind of source")
	// ErrURI means that a URI is malformed.
	ErrURI = errors.New("malformed name of a source")
)

// scheme is what stands before the first colon of a URI.
var scheme = regexp.MustCompile(`^([a-z][a-z0-9+.-]*)://`)

// openers are the kinds of sources that are named by a URI.
var openers = map[string]func(ctx context.Context, uri string, opt Options) (Session, error){
	"nbd": openNBD, "nbds": openNBD, "nbd+unix": openNBD, "nbds+unix": openNBD,
	"imageio": openImageio, "imageio+env": openImageio, "https": openImageio, "http": openImageio,
	"rbd":      openRBD,
	"lvmthin":  openLVMThin,
	"qemu+qmp": openQMP,
	"libvirt":  openLibvirt, "libvirt+ssh": openLibvirt, "libvirt+tls": openLibvirt,
}

// schemeOf is the scheme of a URI; empty for a path, which may look like one.
func schemeOf(uri string) string {
	m := scheme.FindStringSubmatch(uri)
	if m == nil {
		return ""
	}
	if _, err := os.Lstat(uri); err == nil {
		return ""
	}
	return m[1]
}

// Check says whether a source is of a kind that is known, without opening it. The error is
// ErrScheme.
func Check(uri string) error {
	s := schemeOf(uri)
	if s == "" || openers[s] != nil {
		return nil
	}
	return fmt.Errorf("%w: %s: a source is a block device, an image file, or one of %s", ErrScheme, s, strings.Join(slices.Sorted(maps.Keys(openers)), ", "))
}

// Open opens a source: a block device or an image file by its path, or what a URI names. One
// of a scheme that is not known is ErrScheme, unless a file is called so. ctx ends reading, too.
func Open(ctx context.Context, uri string, opt Options) (Session, error) {
	if err := Check(uri); err != nil {
		return nil, err
	}
	if open := openers[schemeOf(uri)]; open != nil {
		return open(ctx, uri, opt)
	}
	if opt.Bitmap != "" || opt.ChangeID != "" || opt.BaseChangeID != "" {
		return nil, fmt.Errorf("%w: %s: --bitmap, --change-id and --base-change-id are for NBD exports and oVirt transfers; a qcow2 has its own (--track)", ErrURI, uri)
	}
	format, err := chooseFormat(uri, opt)
	if err != nil {
		return nil, err
	}
	if format != qemu.Raw {
		return openImage(ctx, uri, format, opt)
	}
	return openRaw(uri, opt)
}

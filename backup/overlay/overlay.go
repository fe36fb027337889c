// Package overlay is a copy-on-write layer over an image: writes go to a local sparse scratch
// file, reads see them over the image, and the image does not change. How the result is
// presented is the task of other packages.
//
// An overlay is a directory with three files:
//
//	data    sparse, as long as the image; a written granule lies at its offset
//	map     a log that says which granules are in data, and which are zero
//	recent  what changed in the map since the last flush, in the page cache
//
// The unit is a granule of 4 KiB. Flush makes everything written before it durable: first
// data, then the map; a crash of the machine at any moment loses nothing flushed. A crash of
// the process loses nothing that was acknowledged. A kept overlay can be opened again over
// the same image, known by its base identity.
package overlay

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/internal/bytesize"
)

// Granule is the unit of copy-on-write in bytes.
const Granule = 4096

// Base is the image under an overlay. Its methods are called concurrently.
type Base interface {
	// Size is the image's length in bytes; it never changes.
	Size() int64
	// ReadAt fills p from off, both within Size.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	// Extents reports the runs of a range in order and without gaps, until yield returns
	// false; the last may extend beyond the range.
	Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error
}

// Options say where an overlay is stored and how much space it may use.
type Options struct {
	// Dir holds the overlay's files and nothing else. It is made if it
	// does not exist, and removed by Close unless Keep is set.
	Dir string
	// Name, if set, is a directory in Dir, used instead of Dir itself. It may come from a
	// repository: a name that leads out of Dir is refused.
	Name string
	// BaseID identifies the image's content, such as a recovery point's ID. An
	// overlay is refused over any other image. At most 4096 bytes.
	BaseID string
	// Limit is the most bytes of scratch data; zero means no limit. At the
	// limit, writes to new places fail with ENOSPC.
	Limit int64
	// Keep keeps the overlay at Close. Without it an existing overlay is refused, since it
	// would be removed.
	Keep bool
}

var (
	// ErrOtherBase means that an overlay belongs to another image.
	ErrOtherBase = errors.New("this overlay belongs to another image: choose another directory, or remove it")
	// ErrInUse means that an overlay is already open.
	ErrInUse = errors.New("this overlay is in use by another process")
	// ErrKept means that an overlay was kept and would be removed without Keep.
	ErrKept = errors.New("it holds overlays of an earlier run, which would be removed at the end: keep them with --keep, give another directory, or remove them")
	// ErrNotFast means that Zero could only write zeroes. It is EOPNOTSUPP.
	ErrNotFast = fmt.Errorf("zeroing here would be no faster than writing: %w", syscall.EOPNOTSUPP)
)

// Overlay is an image with local changes. It is safe for concurrent use.
type Overlay struct {
	base Base
	opt  Options
	dir  *os.Root
	size int64
	data *os.File
	log  *journal

	// gate is read-locked by changes, and locked while nothing may change.
	gate     sync.RWMutex
	segments []atomic.Pointer[segment]
	used     atomic.Int64 // granules in data

	flushing sync.Mutex
	failed   atomic.Pointer[error] // set by a failed sync: later changes cannot be made durable
}

// Open opens the overlay in opt.Dir over base, or starts a new one there.
func Open(base Base, opt Options) (*Overlay, error) {
	size := base.Size()
	if size < 0 || size > math.MaxInt64-segmentSize {
		return nil, fmt.Errorf("overlay over an image of %s", bytesize.Exact(size))
	}
	if len(opt.BaseID) > maxBaseID {
		return nil, fmt.Errorf("overlay: the base identity has %d bytes, more than %d", len(opt.BaseID), maxBaseID)
	}
	dir, err := opt.openDir()
	if err != nil {
		return nil, err
	}
	o := &Overlay{base: base, opt: opt, dir: dir, size: size,
		segments: make([]atomic.Pointer[segment], (size+segmentSize-1)/segmentSize)}
	if o.data, err = dir.OpenFile(dataFile, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("open the overlay's data: %w", err), dir.Close())
	}
	if err := o.load(); err != nil {
		return nil, errors.Join(err, o.data.Close(), dir.Close())
	}
	return o, nil
}

// Files of an overlay.
const (
	dataFile   = "data"
	mapFile    = "map"
	recentFile = "recent"
)

// path of the overlay's directory.
func (opt Options) path() string { return filepath.Join(opt.Dir, opt.Name) }

// openDir opens the overlay's directory, and makes it if necessary.
func (opt Options) openDir() (*os.Root, error) {
	if err := os.MkdirAll(opt.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the overlay's directory: %w", err)
	}
	dir, err := os.OpenRoot(opt.Dir)
	if err == nil && opt.Name != "" {
		parent := dir
		defer parent.Close()
		if err = parent.Mkdir(opt.Name, 0o700); err == nil || errors.Is(err, fs.ErrExist) {
			dir, err = parent.OpenRoot(opt.Name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open the overlay's directory: %w", err)
	}
	return dir, nil
}

// load locks the overlay and reads its map.
func (o *Overlay) load() error {
	if err := unix.Flock(int(o.data.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("overlay %s: %w", o.opt.path(), ErrInUse)
		}
		return fmt.Errorf("lock the overlay: %w", err)
	}
	var st unix.Stat_t
	err := unix.Fstat(int(o.data.Fd()), &st)
	if err == nil && st.Nlink == 0 {
		// Its last user removed it between the opening and the lock.
		return fmt.Errorf("overlay %s: %w", o.opt.path(), ErrInUse)
	}
	if err == nil && !o.opt.Keep {
		if _, err := o.dir.Lstat(mapFile); err == nil {
			return fmt.Errorf("%s: %w", o.opt.path(), ErrKept)
		}
	}
	if err != nil {
		return fmt.Errorf("lock the overlay: %w", err)
	}
	o.log, err = openJournal(o.dir, header{size: o.size, baseID: o.opt.BaseID}, func(r stateRun) {
		o.used.Add(o.apply(r))
	})
	if err != nil {
		return fmt.Errorf("overlay %s: %w", o.opt.path(), err)
	}
	// Only now is it known that the data belongs to this image.
	if err = o.data.Truncate(o.size); err != nil {
		err = fmt.Errorf("size the overlay's data: %w", err)
	} else if o.log.head.version < mapVersion {
		o.log.head.version = mapVersion
		if err = o.log.rewrite(o.allRuns); err != nil {
			err = fmt.Errorf("rewrite the overlay's map: %w", err)
		}
	}
	if err != nil {
		return errors.Join(err, o.log.close(false))
	}
	return nil
}

// Close closes the overlay: it is flushed if kept, else removed.
func (o *Overlay) Close() error {
	if o.opt.Keep {
		err := o.Flush(context.Background())
		return errors.Join(err, o.log.close(err == nil), o.data.Close(), o.dir.Close())
	}
	// Before the lock is released: after that they may belong to another overlay.
	return errors.Join(o.dir.Remove(mapFile), removeRecent(o.dir), o.dir.Remove(dataFile),
		os.Remove(o.opt.path()), o.log.close(false), o.data.Close(), o.dir.Close())
}

// ID identifies this overlay as long as it is kept: one that is removed and made again has
// another ID.
func (o *Overlay) ID() string { return hex.EncodeToString(o.log.head.id[:]) }

// Size is the image's length in bytes.
func (o *Overlay) Size() int64 { return o.size }

// Used is the scratch space taken, in bytes.
func (o *Overlay) Used() int64 { return o.used.Load() * Granule }

// ReadAt fills p from off: changed granules from the overlay, others from the
// image.
func (o *Overlay) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := o.checkRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	var err error
	o.runs(off, int64(len(p)), func(s state, at, n int64) bool {
		part := p[done : done+int(n)]
		k := len(part)
		switch s {
		case inBase:
			k, err = o.base.ReadAt(ctx, part, at)
		case inData:
			k, err = o.data.ReadAt(part, at)
		case isZero:
			clear(part)
		}
		done += k
		return err == nil
	})
	return done, err
}

// checkRange validates a caller's range.
func (o *Overlay) checkRange(off, length int64) error {
	if off < 0 || length < 0 || off > o.size || length > o.size-off {
		return fmt.Errorf("range %d+%d of an overlay of %d bytes: %w", off, length, o.size, syscall.EINVAL)
	}
	return nil
}

// Flush makes all changes that have returned durable.
func (o *Overlay) Flush(context.Context) error {
	o.flushing.Lock()
	defer o.flushing.Unlock()
	if e := o.failed.Load(); e != nil {
		return *e
	}
	// A change is in the log only after its bytes are in data.
	pending := o.log.take()
	if err := unix.Fdatasync(int(o.data.Fd())); err != nil {
		return o.fail(fmt.Errorf("sync the overlay's data: %w", err))
	}
	if err := o.log.append(pending); errors.Is(err, syscall.ENOSPC) && !errors.Is(err, errSync) {
		o.log.restore(pending) // space may become free
		return fmt.Errorf("write the overlay's map: %w", err)
	} else if err != nil {
		return o.fail(fmt.Errorf("write the overlay's map: %w", err))
	}
	o.log.flushed()
	if !o.log.wantsRewrite() {
		return nil
	}
	o.gate.Lock()
	defer o.gate.Unlock()
	later := o.log.take() // is in the states
	if err := unix.Fdatasync(int(o.data.Fd())); err != nil {
		return o.fail(fmt.Errorf("sync the overlay's data: %w", err))
	}
	if err := o.log.rewrite(o.allRuns); errors.Is(err, syscall.ENOSPC) && !errors.Is(err, errSync) {
		o.log.restore(later) // the longer map says the same
		return nil
	} else if err != nil {
		return o.fail(fmt.Errorf("rewrite the overlay's map: %w", err))
	}
	o.log.flushed()
	return nil
}

// fail records that the content of the page cache is unknown from now on: after a failed
// sync, a later one may succeed without the lost pages. The next process continues from the
// last successful flush.
func (o *Overlay) fail(err error) error {
	o.log.forget()
	o.failed.Store(&err)
	return err
}

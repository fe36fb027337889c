package hydrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options of a Cache.
type Options struct {
	// Dir holds the copies and nothing else. It is made if it does not exist.
	Dir string
	// Keep keeps copies for a later Cache of the same directory. Without it a copy is deleted
	// when its disk is closed.
	Keep bool
	// Limit bounds the data of all copies, in bytes; 0 for no limit.
	Limit int64
	// FreeShare, if Limit is 0, sets it to a share of the space that is free at the start or
	// used by copies; 0 for no limit.
	FreeShare float64
	// Workers hydrate concurrently, for all disks together; 0 for half of the processors, so
	// that readers find one free.
	Workers int
	// Retry is the time between passes over an image that could not be read completely; 0 for
	// a minute.
	Retry time.Duration
	Log   *slog.Logger
}

var (
	// ErrInUse means that a directory, or a copy in it, is already in use.
	ErrInUse = errors.New("this hydration cache is in use by another process: choose another directory")
	// ErrNotACache means that a directory holds something else: a cache deletes old copies in
	// its directory.
	ErrNotACache = errors.New("this directory is not empty and holds no local copies: give a new or empty one, not that of overlays")
	errID        = errors.New("the identity of an image is one to 200 bytes")
)

// Cache is a directory of copies and the workers that hydrate them.
type Cache struct {
	opt  Options
	log  *slog.Logger
	root *os.Root // of the directory
	lock *os.File

	used    atomic.Int64 // bytes of data, of open copies and others
	filled  atomic.Int64 // bytes added since the start
	read    atomic.Int64 // bytes read from copies
	removed atomic.Int64 // copies that made room
	noSpace atomic.Bool  // the file system is full, until something is deleted
	told    atomic.Bool  // logged that nothing more is kept

	gate    gate
	start   sync.Once
	jobs    chan job
	cancel  context.CancelFunc
	ctx     context.Context // ends the workers, which outlive the calls that start them
	workers sync.WaitGroup

	mu   sync.Mutex
	open map[string]*Disk
	idle map[string]idleCopy // copies that are not open
}

// idleCopy is a copy on disk.
type idleCopy struct {
	bytes int64
	last  time.Time
}

// New opens the cache in a directory.
func New(opt Options) (*Cache, error) {
	c := &Cache{opt: opt, log: opt.Log, jobs: make(chan job), open: map[string]*Disk{}, idle: map[string]idleCopy{}}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.opt.Workers <= 0 {
		c.opt.Workers = max(runtime.GOMAXPROCS(0)/2, 1)
	}
	if c.opt.Retry <= 0 {
		c.opt.Retry = time.Minute
	}
	c.gate.init()
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if err := os.MkdirAll(opt.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of the hydration cache: %w", err)
	}
	root, err := os.OpenRoot(opt.Dir)
	if err != nil {
		return nil, fmt.Errorf("open the directory of the hydration cache: %w", err)
	}
	c.root = root
	if err := c.take(); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	for c.opt.Limit > 0 && c.used.Load() > c.opt.Limit && c.evict() {
	}
	return c, nil
}

// take locks the directory and lists its copies.
func (c *Cache) take() error {
	dir := c.opt.Dir
	if err := checkOwn(c.root); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	lock, err := c.root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("lock the hydration cache: %w", err)
	}
	c.lock = lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrInUse
		}
		return errors.Join(fmt.Errorf("lock the hydration cache %s: %w", dir, err), lock.Close())
	}
	_, err = lock.WriteAt([]byte(cacheMark), 0)
	if err == nil {
		err = c.scan()
	}
	if err != nil {
		return errors.Join(err, lock.Close())
	}
	if c.opt.Limit == 0 && c.opt.FreeShare > 0 {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			return errors.Join(fmt.Errorf("ask for the free space of the hydration cache: %w", err), lock.Close())
		}
		free := float64(st.Bavail)*float64(st.Bsize) + float64(c.used.Load())
		c.opt.Limit = max(int64(free*c.opt.FreeShare), 1)
	}
	return nil
}

// lockFile is in the directory of each cache, and begins with cacheMark.
const (
	lockFile  = "lock"
	cacheMark = "Varve keeps local copies here and deletes them when unused.\n"
)

// checkOwn refuses a directory with other content, such as overlays or a home: what looks
// like copies there must not be deleted.
func checkOwn(dir *os.Root) error {
	entries, err := fs.ReadDir(dir.FS(), ".")
	if err != nil {
		return fmt.Errorf("list the hydration cache: %w", err)
	}
	others := 0
	for _, e := range entries {
		if e.Name() != lockFile && e.Name() != "lost+found" {
			others++
		}
	}
	mark, err := dir.ReadFile(lockFile)
	switch {
	case errors.Is(err, fs.ErrNotExist) && others == 0:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return ErrNotACache
	case err != nil:
		return fmt.Errorf("read the lock of the hydration cache: %w", err)
	case string(mark) == cacheMark, len(mark) == 0 && others == 0:
		return nil
	}
	return ErrNotACache
}

// isMap reports whether a file begins like the map of a copy.
func (c *Cache) isMap(path string) bool {
	f, err := c.root.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	b := make([]byte, len(mapMagic))
	_, err = io.ReadFull(f, b)
	return err == nil && string(b) == mapMagic
}

// removeCopy removes the files of a copy, and its directory if it is empty then.
func (c *Cache) removeCopy(name string) error {
	var errs []error
	for _, path := range []string{filepath.Join(name, "data"), filepath.Join(name, "map"), name} {
		if err := c.root.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// scan finds the copies that an earlier process left.
func (c *Cache) scan() error {
	entries, err := fs.ReadDir(c.root.FS(), ".")
	if err != nil {
		return fmt.Errorf("list the hydration cache: %w", err)
	}
	for _, e := range entries {
		st, err := c.root.Stat(filepath.Join(e.Name(), "data"))
		if !e.IsDir() || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list the hydration cache: %w", err)
		}
		if !st.Mode().IsRegular() || !c.isMap(filepath.Join(e.Name(), "map")) {
			continue // another program put it here
		}
		n := int64(0)
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			n = sys.Blocks * 512
		}
		c.idle[e.Name()] = idleCopy{bytes: n, last: st.ModTime()}
		c.used.Add(n)
	}
	return nil
}

// dirName returns the name of an image's directory.
func dirName(id string) (string, error) {
	name := url.PathEscape(id)
	if name == "" || len(name) > maxID || strings.HasPrefix(name, ".") || name == lockFile {
		return "", fmt.Errorf("hydrate %q: %w", id, errID)
	}
	return name, nil
}

// Retain removes the copies of images that are no longer wanted. Open ones stay until they
// are closed.
func (c *Cache) Retain(wanted func(id string) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name := range c.idle {
		if id, err := url.PathUnescape(name); err != nil || !wanted(id) {
			c.removeLocked(name)
		}
	}
}

// removeLocked removes an idle copy.
func (c *Cache) removeLocked(name string) {
	if err := c.removeCopy(name); err != nil {
		c.log.Warn("cannot remove a copy from the hydration cache", "id", name, "err", err)
	}
	c.used.Add(-c.idle[name].bytes)
	delete(c.idle, name)
	c.removed.Add(1)
	c.roomAgain()
}

// roomAgain records that space became free.
func (c *Cache) roomAgain() {
	c.noSpace.Store(false)
	c.told.Store(false)
}

// reserve takes space for n bytes, if necessary from idle copies.
func (c *Cache) reserve(n int64) bool {
	for !c.noSpace.Load() {
		used := c.used.Load()
		if c.opt.Limit <= 0 || used+n <= c.opt.Limit {
			if c.used.CompareAndSwap(used, used+n) {
				return true
			}
			continue
		}
		if !c.evict() {
			if c.used.Load() != used { // another one evicted, or gave back
				continue
			}
			c.tell("the hydration cache has reached its limit; what is not in it is read from the repository", "limit", c.opt.Limit)
			return false
		}
	}
	return false
}

// evict removes the least recently used idle copy.
func (c *Cache) evict() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evictLocked()
}

func (c *Cache) evictLocked() bool {
	oldest := ""
	for name, i := range c.idle {
		if oldest == "" || i.last.Before(c.idle[oldest].last) {
			oldest = name
		}
	}
	if oldest == "" {
		return false
	}
	c.removeLocked(oldest)
	return true
}

// outOfSpace handles a file system that was full for a write. removed is c.removed when the write began.
func (c *Cache) outOfSpace(err error, removed int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.evictLocked() || c.removed.Load() != removed { // there may be room by now
		return
	}
	c.noSpace.Store(true)
	c.tell("no space left for the hydration cache; what is not in it is read from the repository", "err", err)
}

// tell logs once that nothing more is kept.
func (c *Cache) tell(text string, args ...any) {
	if !c.told.Swap(true) {
		c.log.Warn(text, append([]any{"directory", c.opt.Dir, "bytes", c.used.Load()}, args...)...)
	}
}

// full reports whether there is no room for a unit.
func (c *Cache) full(n int64) bool {
	return c.noSpace.Load() || c.opt.Limit > 0 && c.used.Load()+n > c.opt.Limit && c.told.Load()
}

// Stats is a snapshot of a cache's counters.
type Stats struct {
	Bytes    int64 // of data that copies hold now
	Limit    int64 // of Bytes; 0 for none
	Filled   int64 // bytes of images fetched since the start
	Read     int64 // bytes read from copies
	Open     int   // copies in use
	Complete int   // complete copies in use
}

// Stats returns the current counters.
func (c *Cache) Stats() Stats {
	st := Stats{Bytes: c.used.Load(), Limit: c.opt.Limit, Filled: c.filled.Load(), Read: c.read.Load()}
	c.mu.Lock()
	defer c.mu.Unlock()
	st.Open = len(c.open)
	for _, d := range c.open {
		if d.Complete() {
			st.Complete++
		}
	}
	return st
}

// Close ends the workers. Close all disks before. The directory is removed if nothing is kept
// and it is empty.
func (c *Cache) Close() error {
	c.cancel()
	c.workers.Wait()
	var err error
	if !c.opt.Keep {
		c.mu.Lock()
		for name := range c.idle {
			c.removeLocked(name)
		}
		c.mu.Unlock()
		err = c.root.Remove(lockFile)
		_ = os.Remove(c.opt.Dir) // fails if it has other content
	}
	return errors.Join(err, c.lock.Close(), c.root.Close())
}

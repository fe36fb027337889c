package repository

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/content"
	"golang.org/x/sys/unix"
)

// sessionNotes is a directory on this machine, beside the configuration file, with a note
// for each open write session of Kopia's. A note lists the blobs that its session writes,
// and the process locks it while the session is open. The kernel releases the lock when
// the process ends in any way: a note of this boot without a lock belongs to a session
// that no process will finish. (A PID would not do: it is reused, and means nothing in
// another PID namespace.) Kopia's own marker of a session, a blob, only shows its age.
//
// A note is
//
//	varve session 1 BOOT
//	BLOB
//	...
//
// in the file SESSION, each blob noted before it is written. A note of another boot says
// nothing: the directory may be shared with another machine, whose locks are not seen here.
// Safe for concurrent use.
type sessionNotes struct {
	log  *slog.Logger
	dir  string
	boot string

	mu      sync.Mutex
	open    map[content.SessionID]*sessionNote
	storage blob.Storage // as it was opened; nil before
}

// sessionNote is the note of a session of this process.
type sessionNote struct {
	f     *os.File
	owner *Writer // nil for Kopia's own
}

const (
	noteHeader = "varve session 1 "
	// maxNote bounds the size of a note: 60 bytes per blob, and a checkpoint's session
	// has a few thousand at most.
	maxNote = 8 << 20
	// staleNote is the age at which a note of another boot is deleted. Its session's
	// packs are left to maintenance, which decides by their age.
	staleNote = 7 * 24 * time.Hour
)

var (
	sessionName = regexp.MustCompile(`^s[0-9a-f]{17,40}$`)
	blobName    = regexp.MustCompile(`^[a-z0-9][a-z0-9_]{0,200}(-[a-z0-9_-]{0,200})?$`)
)

// newSessionNotes returns nil where there can be none.
func newSessionNotes(configFile string, log *slog.Logger) *sessionNotes {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || configFile == "" {
		return nil
	}
	return &sessionNotes{log: log, dir: notesDir(configFile), boot: strings.TrimSpace(string(boot)), open: map[content.SessionID]*sessionNote{}}
}

func notesDir(configFile string) string { return configFile + ".sessions" }

type notesKey struct{}

func withNotes(ctx context.Context, n *sessionNotes) context.Context {
	return context.WithValue(ctx, notesKey{}, n)
}

func notesOf(ctx context.Context) *sessionNotes {
	n, _ := ctx.Value(notesKey{}).(*sessionNotes)
	return n
}

type writerKey struct{}

// withWriter assigns the sessions begun with a context to a writer.
func withWriter(ctx context.Context, w *Writer) context.Context {
	return context.WithValue(ctx, writerKey{}, w)
}

// writing notes a blob that is about to be written. The first of a session is its marker.
// If it cannot be noted the write continues: a note only saves work after a kill.
func (n *sessionNotes) writing(ctx context.Context, id blob.ID) {
	session := content.SessionIDFromBlobID(id)
	if n == nil || session == "" {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	note := n.open[session]
	if note == nil {
		if !strings.HasPrefix(string(id), string(content.BlobIDPrefixSession)) || !sessionName.MatchString(string(session)) {
			return // a blob of a session whose note could not be made
		}
		f, err := n.create(string(session))
		if err != nil {
			n.log.DebugContext(ctx, "cannot note a write session", "error", err)
			return
		}
		owner, _ := ctx.Value(writerKey{}).(*Writer)
		note = &sessionNote{f: f, owner: owner}
		n.open[session] = note
	}
	if _, err := io.WriteString(note.f, string(id)+"\n"); err != nil {
		n.log.DebugContext(ctx, "cannot note a blob of a write session", "error", err)
	}
}

// create makes a note that is locked before other processes see it.
func (n *sessionNotes) create(session string) (f *os.File, err error) {
	for range 2 { // close of another process may remove the directory between the two
		if err = os.MkdirAll(n.dir, 0o700); err == nil {
			f, err = os.CreateTemp(n.dir, ".new-*")
		}
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("note of a write session: %w", err)
	}
	if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
		if _, err = io.WriteString(f, noteHeader+n.boot+"\n"); err == nil {
			err = os.Rename(f.Name(), filepath.Join(n.dir, session))
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("note of a write session: %w", err), os.Remove(f.Name()), f.Close())
	}
	return f, nil
}

// deleted ends a session whose marker was deleted: all it wrote is in the index.
func (n *sessionNotes) deleted(id blob.ID) {
	if n == nil || !strings.HasPrefix(string(id), string(content.BlobIDPrefixSession)) {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	session := content.SessionIDFromBlobID(id)
	note := n.open[session]
	if note == nil {
		return
	}
	delete(n.open, session)
	// Before the lock is released: else an ended session could look dead.
	_ = os.Remove(filepath.Join(n.dir, string(session)))
	_ = note.f.Close()
}

// abandon gives up the sessions of a closed writer: the next one can recover what they
// wrote and did not flush.
func (n *sessionNotes) abandon(w *Writer) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for session, note := range n.open {
		if note.owner == w {
			delete(n.open, session)
			_ = note.f.Close()
		}
	}
}

// close gives up all sessions.
func (n *sessionNotes) close() {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for session, note := range n.open {
		delete(n.open, session)
		_ = note.f.Close()
	}
	_ = os.Remove(n.dir) // unless it has notes of others
}

// opened sets the storage of the notes.
func (n *sessionNotes) opened(st blob.Storage) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.storage = st
}

// pathOf returns the file of a blob; ok is false unless the storage is a directory.
func (n *sessionNotes) pathOf(ctx context.Context, id blob.ID) (path string, ok bool, err error) {
	n.mu.Lock()
	st := n.storage
	n.mu.Unlock()
	dir, ok := st.(interface {
		GetShardedPathAndFilePath(ctx context.Context, id blob.ID) (dir, file string, err error)
	})
	if !ok {
		return "", false, nil
	}
	if _, ok := st.ConnectionInfo().Config.(*filesystem.Options); !ok {
		return "", false, nil
	}
	if _, path, err = dir.GetShardedPathAndFilePath(ctx, id); err != nil {
		return "", false, fmt.Errorf("file of blob %s: %w", id, err)
	}
	return path, true, nil
}

// deadSession is a session that ended before it was committed. Its note is locked, so
// that only one process handles it.
type deadSession struct {
	blobs []blob.ID
	f     *os.File
	path  string
}

// release leaves the session to the next.
func (d *deadSession) release() { _ = d.f.Close() }

// forget deletes the note of a session that was handled.
func (d *deadSession) forget() error {
	err := os.Remove(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, d.f.Close())
}

// dead returns the dead sessions whose locks this process gets. The caller releases or
// forgets each.
func (n *sessionNotes) dead(now time.Time) ([]*deadSession, error) {
	if n == nil {
		return nil, nil
	}
	entries, err := os.ReadDir(n.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list write sessions: %w", err)
	}
	var out []*deadSession
	for _, e := range entries {
		path := filepath.Join(n.dir, e.Name())
		if !e.Type().IsRegular() || !sessionName.MatchString(e.Name()) {
			if strings.HasPrefix(e.Name(), ".new-") && isOld(path, now) {
				_ = os.Remove(path)
			}
			continue
		}
		if d := n.take(path, now); d != nil {
			out = append(out, d)
		}
	}
	return out, nil
}

// take locks a note and reads it; it returns nil for one that is locked, gone, of
// another boot, or another user's.
func (n *sessionNotes) take(path string, now time.Time) (d *deadSession) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	defer func() {
		if d == nil {
			_ = f.Close()
		}
	}()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return nil // alive, or another process handles it
	}
	// The session may have been committed between the listing and the lock.
	mine, err1 := f.Stat()
	there, err2 := os.Stat(path)
	if err1 != nil || err2 != nil || !os.SameFile(mine, there) {
		return nil // gone
	}
	boot, blobs, err := readNote(f)
	if err != nil || boot != n.boot {
		if isOld(path, now) {
			_ = os.Remove(path)
		}
		return nil // says nothing
	}
	return &deadSession{blobs: blobs, f: f, path: path}
}

func isOld(path string, now time.Time) bool {
	st, err := os.Stat(path)
	return err == nil && now.Sub(st.ModTime()) > staleNote
}

var errBadNote = errors.New("not a note of a write session")

// readNote parses a note. A line that is no blob's name ends it: the process was killed
// while writing it.
func readNote(r io.Reader) (boot string, blobs []blob.ID, err error) {
	s := bufio.NewScanner(io.LimitReader(r, maxNote))
	s.Buffer(make([]byte, 0, 1024), 4096)
	if !s.Scan() {
		return "", nil, errBadNote
	}
	boot, ok := strings.CutPrefix(s.Text(), noteHeader)
	if !ok || boot == "" {
		return "", nil, errBadNote
	}
	for s.Scan() {
		if !blobName.MatchString(s.Text()) {
			break
		}
		blobs = append(blobs, blob.ID(s.Text()))
	}
	return boot, blobs, nil
}

package csidriver

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// volume is one disk: an image file of Size-short bytes.
type volume struct {
	ID, Name   string
	Size       int64  // as reported, bytes
	Node       string `json:",omitempty"` // of node-local volumes
	SrcSnap    string `json:",omitempty"`
	SrcVol     string `json:",omitempty"`
	Filesystem bool
	Published  string            `json:",omitempty"` // the node it is attached to
	Staged     map[string]string `json:",omitempty"` // node -> staging path
}

// snapshot is a copy of a volume's image. A deleted one is kept, marked, while its
// volume lives, if the driver answers deltas without their base.
type snapshot struct {
	ID, Name, VolID string
	Size            int64
	Node            string `json:",omitempty"`
	GroupID         string `json:",omitempty"`
	Filesystem      bool
	Created         time.Time
	Deleted         bool `json:",omitempty"`
}

type group struct {
	ID, Name string
	Created  time.Time
	Snaps    []string
}

type records struct {
	Vols   map[string]*volume
	Snaps  map[string]*snapshot
	Groups map[string]*group
}

// state is what all processes of a driver share: records in state.json, changed
// only under the lock file, and image files.
type state struct {
	dir string
	mu  sync.Mutex // flock is per open file; this serialises the goroutines of a process
}

func (s *state) image(id string) string { return filepath.Join(s.dir, id+".img") }

// with runs fn on the current records and stores them afterwards, unless fn fails. fn
// must not block.
func (s *state) with(fn func(*records) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	lock, err := os.OpenFile(filepath.Join(s.dir, "state.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock the driver's state: %w", err)
	}
	path := filepath.Join(s.dir, "state.json")
	r := &records{Vols: map[string]*volume{}, Snaps: map[string]*snapshot{}, Groups: map[string]*group{}}
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		if err := json.Unmarshal(old, r); err != nil {
			return fmt.Errorf("read the driver's state: %w", err)
		}
	}
	if err := fn(r); err != nil {
		return err
	}
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if string(b) == string(old) {
		return nil
	}
	return replaceFile(path, b)
}

func newID(prefix string) string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return prefix + "-" + hex.EncodeToString(b)
}

// inFlight refuses a second call for the same object while the first runs, as the
// CSI specification asks (ABORTED, "operation pending for volume").
type inFlight struct {
	mu   sync.Mutex
	keys map[string]bool
}

func (f *inFlight) begin(key string) (end func(), ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.keys[key] {
		return nil, false
	}
	if f.keys == nil {
		f.keys = map[string]bool{}
	}
	f.keys[key] = true
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.keys, key)
	}, true
}

// Held lists what the driver whose state is in dir keeps, sorted: the IDs of its volumes
// and of the snapshots that were not deleted.
func Held(dir string) (volumes, snapshots []string, err error) {
	s := &state{dir: dir}
	err = s.with(func(r *records) error {
		volumes = slices.Sorted(maps.Keys(r.Vols))
		for id, sn := range r.Snaps {
			if !sn.Deleted {
				snapshots = append(snapshots, id)
			}
		}
		slices.Sort(snapshots)
		return nil
	})
	return volumes, snapshots, err
}

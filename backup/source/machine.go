package source

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of virtual machines.
var (
	// ErrMachineBusy means that another backup of the same machine runs.
	ErrMachineBusy = errors.New("another backup, or another job, of this machine is running")
	// ErrScratchFull means that the place for what the guest overwrites got too small.
	ErrScratchFull = errors.New("the scratch directory has no more room for what the guest overwrites while the backup reads")
	// ErrMoment means that what was read is not of one moment.
	ErrMoment = errors.New("the machine's disks did not stay at the moment of the backup")
	// ErrNoDisk means that a machine has no such disk.
	ErrNoDisk = errors.New("the machine has no such disk")
)

// Machine is a Session of a whole virtual machine.
type Machine interface {
	Session
	// Name of the machine, for people; empty if it has none.
	Name() string
	// Moment is when all disks were as the session shows them, and how long the guest's file
	// systems were frozen for it; 0 if they were not.
	Moment() (at time.Time, frozen time.Duration)
	// Parts are what a machine needs beside its disks, such as its definition.
	Parts() []Part
}

// Part is a small file of a machine.
type Part struct {
	Name    string // fit to end the name of a volume
	Content []byte
}

// MachineOptions are those of virtual machines; others ignore them.
type MachineOptions struct {
	// Base is the change ID that the next increment of a disk builds on, by the disk's name;
	// empty for none.
	Base func(disk string) string
	// Include are the only disks to read, Exclude those to leave out, by name.
	Include, Exclude []string
	// Scratch is a directory for what the guest overwrites while a backup reads; empty for
	// DefaultScratch.
	Scratch string
	// Freeze has the guest's agent freeze its file systems for the moment of the backup. Self
	// starts this program as the process that calls GuardFreeze.
	Freeze bool
	Self   []string
	// Step is called after each step; tests end the process there.
	Step func(string)
}

// DefaultScratch is on a disk on most systems, where /tmp may be memory.
const DefaultScratch = "/var/tmp"

func (o Options) step(name string) {
	if o.Step != nil {
		o.Step(name)
	}
}

func (o Options) base(disk string) string {
	if o.Base == nil {
		return ""
	}
	return o.Base(disk)
}

// wanted reports whether a disk is to be read.
func (o Options) wanted(name string) bool {
	return (len(o.Include) == 0 || slices.Contains(o.Include, name)) && !slices.Contains(o.Exclude, name)
}

// checkWanted refuses a choice that names a disk that is not there, or leaves none.
func (o Options) checkWanted(have []string) error {
	for _, name := range slices.Concat(o.Include, o.Exclude) {
		if !slices.Contains(have, name) {
			return fmt.Errorf("%w: %s; it has %s", ErrNoDisk, name, strings.Join(have, ", "))
		}
	}
	if len(have) == 0 {
		return fmt.Errorf("%w: it has none that can be written to", ErrNoDisk)
	}
	if !slices.ContainsFunc(have, o.wanted) {
		return fmt.Errorf("%w: none is left to back up of %s", ErrNoDisk, strings.Join(have, ", "))
	}
	return nil
}

// keyOf is a short name of a machine for files and sockets.
func keyOf(machine string) string {
	sum := sha256.Sum256([]byte(machine))
	return hex.EncodeToString(sum[:6])
}

// machineLock keeps other backups of a machine away until it is closed, or this process ends.
type machineLock struct{ file *os.File }

// lockMachine locks a machine. The error is ErrMachineBusy where it is locked.
func lockMachine(key string) (*machineLock, error) {
	dir, err := runDir()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, key+".lock")
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock the machine: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			_ = f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, ErrMachineBusy
			}
			return nil, fmt.Errorf("lock the machine: %w", err)
		}
		ours, err := f.Stat()
		if err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("lock the machine: %w", err)
		}
		if now, err := os.Lstat(path); err == nil && os.SameFile(ours, now) {
			return &machineLock{f}, nil
		}
		_ = f.Close() // its owner removed it before we had the lock
	}
}

// Close removes the lock's file and releases it.
func (l *machineLock) Close() error {
	return errors.Join(os.Remove(l.file.Name()), l.file.Close())
}

// runDir is a directory of this user that is the same for each run.
func runDir() (string, error) {
	uid := strconv.Itoa(os.Getuid())
	candidates := []string{filepath.Join(os.TempDir(), "varve-"+uid)}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		candidates = append([]string{filepath.Join(dir, "varve")}, candidates...)
	}
	if os.Getuid() == 0 {
		candidates = append([]string{"/run/varve"}, candidates...)
	}
	var errs []error
	for _, dir := range candidates {
		err := ownDir(dir, 0o700)
		if err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", fmt.Errorf("no directory for locks: %w", errors.Join(errs...))
}

// ownDir makes a directory, or accepts one that only this user could have made: in a shared
// directory another user may have been there first.
func ownDir(dir string, mode os.FileMode) error {
	if err := os.Mkdir(dir, mode); err == nil {
		return os.Chmod(dir, mode) // whatever the umask
	} else if !errors.Is(err, os.ErrExist) {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || !ok || int(st.Uid) != os.Getuid() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is not a directory that only this user can write to", dir)
	}
	return nil
}

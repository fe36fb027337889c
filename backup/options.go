package backup

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/plain"
)

// Disk is what a backup reads; disk.Source is one. ReadAt is called concurrently.
type Disk interface {
	io.ReaderAt
	// Size of the disk in bytes.
	Size() int64
	// CheckSize fails if the disk's size has changed since it was opened.
	CheckSize() error
}

// HoleFinder is a Disk that can list its holes without reading.
type HoleFinder interface {
	// DataRange returns the next range at or after off that may hold data, in bytes, or
	// io.EOF if the rest of the disk is a hole.
	DataRange(off int64) (start, end int64, err error)
}

// RangeError is a read error that names the bytes that cannot be read.
type RangeError interface {
	error
	BadRange() (offset, length int64)
}

// ReadErrorPolicy says what to do with a range that cannot be read.
type ReadErrorPolicy int

// Read error policies.
const (
	FailOnReadError ReadErrorPolicy = iota
	ZeroOnReadError                 // store zeroes and record the range
)

// MismatchPolicy says what to do when the spot check finds a change that the source did not
// report.
type MismatchPolicy int

// Mismatch policies.
const (
	FailOnMismatch MismatchPolicy = iota
	FullOnMismatch                // continue by comparing the whole disk
)

// Options of a backup.
type Options struct {
	Volume points.Volume
	Disk   Disk
	// Source lists what changed since the parent; nil reads and compares the whole disk.
	Source cbt.Source
	// Fallback are the sources to ask, in order, when Source fails with a reason
	// (cbt.FallbackReason); any other failure ends the backup. Each fallback is recorded with
	// the point and passed to OnFallback, on the caller's goroutine.
	Fallback   []cbt.Source
	OnFallback func(blocktree.Fallback)
	// Check, if set, is called after the last read, before the point is recorded. It fails if
	// what was read is not of one moment; then no point is made.
	Check func(context.Context) error
	// Full builds on no parent.
	Full bool
	// Parent is the name of the point to build on; empty for the latest.
	Parent string
	// Branch allows a Parent of another volume: the new point begins or continues a volume
	// that shares the parent's blocks. The parent's volume handle does not apply to the new
	// volume.
	Branch bool
	// OtherDisk says what to do with a disk that is not the newest point's, and AllowShrink
	// accepts one that became smaller. In a new lineage Source is used only with Full, since
	// its changes are relative to another disk; Fallback is used.
	OtherDisk   OtherDiskPolicy
	AllowShrink bool
	// BlockSize in bytes; 0 for the parent's, or for the default of the size.
	BlockSize int64
	// NotCrashConsistent marks a disk that was written to while it was read.
	NotCrashConsistent bool
	// Consistency is how the moment of the point was made, for its record; nil if unknown.
	Consistency *blocktree.Consistency
	// Group marks the point as one of a group (points.NewGroup), of which the volume is a
	// member. RunGroup makes all of them.
	Group       *blocktree.Group
	OnReadError ReadErrorPolicy
	OnMismatch  MismatchPolicy
	// VerifyUnchanged is the share of the blocks reported unchanged that is read
	// and compared with the parent, from 0 to 1.
	VerifyUnchanged float64
	// SpotCheckBytes and SpotCheckTime bound that check; 0 for the defaults, below 0 for
	// no bound.
	SpotCheckBytes int64
	SpotCheckTime  time.Duration
	// Workers read, hash, compress and encrypt; 0 for one and a half per CPU.
	Workers int
	// CheckpointEvery bounds the time between checkpoints; 0 for a minute.
	CheckpointEvery time.Duration
	VolumeHandle    string
	FileSystem      string
	// Claim is the disk's claim in Kubernetes, for the record.
	Claim *blocktree.Claim
	// Time is the moment whose state the disk holds, as of a snapshot; zero is the start of
	// the run.
	Time        time.Time
	ToolVersion string
	Progress    func(Progress)

	notes []string // for the record
	// step is called at each step of a run; tests interfere there.
	step func(string)
	// protectAll makes short runs protect their parent too; for tests.
	protectAll bool
	// protectAfter is used instead of the constant, unless it is 0; for tests whose runs make no more checkpoints on a
	// slow machine than on others.
	protectAfter time.Duration
}

// Progress of a long run.
type Progress struct {
	Phase string // what is being done
	Done  int64  // bytes
	Total int64  // bytes; 0 while unknown
}

// check refuses what cannot be backed up, and sets defaults.
func (opt *Options) check() error {
	if err := opt.Volume.Check(); err != nil {
		return err
	}
	if opt.Disk == nil { // a stream
		return opt.checkCommon()
	}
	if size := opt.Disk.Size(); size > blocktree.MaxSize {
		return fmt.Errorf("%s: %w: the disk has %s; no point was made; back up its partitions or its files by themselves",
			opt.Volume, ErrTooLarge, bytesize.Exact(size))
	}
	return opt.checkCommon()
}

func (opt *Options) checkCommon() error {
	if err := blocktree.CheckHandle(opt.VolumeHandle); err != nil {
		return fmt.Errorf("%s: volume handle %q: %w", opt.Volume, plain.Clip(opt.VolumeHandle, 256), err)
	}
	if err := opt.checkGroup(); err != nil {
		return err
	}
	if opt.Workers <= 0 {
		opt.Workers = runtime.NumCPU() + (runtime.NumCPU()+1)/2
	}
	if opt.CheckpointEvery <= 0 {
		opt.CheckpointEvery = defaultCheckpointEvery
	}
	if opt.protectAfter <= 0 {
		opt.protectAfter = protectAfter
	}
	if opt.step == nil {
		opt.step = func(string) {}
	}
	if opt.OnFallback == nil {
		opt.OnFallback = func(blocktree.Fallback) {}
	}
	if opt.Progress == nil {
		opt.Progress = func(Progress) {}
	}
	return nil
}

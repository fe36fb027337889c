package csidriver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
)

// Options control a driver's behaviour. The zero value is a well-behaved driver.
type Options struct {
	// AttachRequired makes the driver require ControllerPublishVolume before staging, and
	// refuse to publish to a second node.
	AttachRequired bool `json:"attachRequired,omitempty"`
	// DetachDelay is how long ControllerUnpublishVolume takes.
	DetachDelay Duration `json:"detachDelay,omitempty"`
	// NoListSnapshots drops the LIST_SNAPSHOTS capability.
	NoListSnapshots bool `json:"noListSnapshots,omitempty"`
	// NoBlock refuses volumes in Block mode.
	NoBlock bool `json:"noBlock,omitempty"`
	// KeepSourceOfSnapshots refuses DeleteVolume while snapshots of it exist.
	KeepSourceOfSnapshots bool `json:"keepSourceOfSnapshots,omitempty"`
	// RoundTo is the unit to which sizes are rounded up, in bytes; 0 means 1 MiB.
	RoundTo int64 `json:"roundTo,omitempty"`
	// ShortBy is how many bytes a device lacks of the size the driver reports.
	ShortBy int64 `json:"shortBy,omitempty"`
	// RequiredSecret, if set, must be secret "token" of each call that can carry secrets.
	RequiredSecret string `json:"requiredSecret,omitempty"`
	// NodeLocal keeps a volume, its snapshots and clones on the node it was made
	// for and reports topology.
	NodeLocal bool `json:"nodeLocal,omitempty"`

	Metadata MetadataOptions `json:"metadata,omitzero"`
}

// MetadataOptions control the SnapshotMetadata service.
type MetadataOptions struct {
	// Absent drops the capability and answers UNIMPLEMENTED.
	Absent bool `json:"absent,omitempty"`
	// Variable answers with VARIABLE_LENGTH extents instead of FIXED_LENGTH blocks.
	Variable bool `json:"variable,omitempty"`
	// BlockSize is the granularity in bytes; 0 means 4096.
	BlockSize int64 `json:"blockSize,omitempty"`
	// MessageTuples is the number of tuples in a message if the caller names none;
	// 0 means 256.
	MessageTuples int32 `json:"messageTuples,omitempty"`
	// CutAfter ends a stream with UNAVAILABLE after this many tuples.
	CutAfter int64 `json:"cutAfter,omitempty"`
	// TruncateAfter ends a stream after this many tuples as if it were complete.
	TruncateAfter int64 `json:"truncateAfter,omitempty"`
	// OmitEvery leaves out each Nth tuple: a driver that lies.
	OmitEvery int64 `json:"omitEvery,omitempty"`
	// BaseNotRequired answers deltas whose base snapshot has been deleted.
	BaseNotRequired bool `json:"baseNotRequired,omitempty"`
	// BlockModeOnly answers FAILED_PRECONDITION for snapshots of Filesystem volumes.
	BlockModeOnly bool `json:"blockModeOnly,omitempty"`
	// MessageDelay is how long each message takes.
	MessageDelay Duration `json:"messageDelay,omitempty"`
	// FailWith answers each call with this gRPC code, such as FAILED_PRECONDITION.
	FailWith string `json:"failWith,omitempty"`
	// FailDeltaOnly restricts FailWith to deltas.
	FailDeltaOnly bool `json:"failDeltaOnly,omitempty"`
	// FailCalls ends FailWith after this many calls of this process; 0 means never.
	FailCalls int64 `json:"failCalls,omitempty"`
}

// Duration is a time.Duration written as in "1.5s".
type Duration time.Duration

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

const (
	defaultRoundTo       = int64(1 << 20)
	defaultBlockSize     = int64(4096)
	defaultMessageTuples = int32(256)
)

// Validate returns an error for options that cannot work.
func (o Options) Validate() error {
	if o.RoundTo < 0 || o.ShortBy < 0 {
		return errors.New("roundTo and shortBy must not be negative")
	}
	m := o.Metadata
	if m.BlockSize < 0 || m.BlockSize%512 != 0 {
		return fmt.Errorf("metadata block size %d is not a multiple of 512", m.BlockSize)
	}
	if m.CutAfter < 0 || m.TruncateAfter < 0 || m.OmitEvery < 0 || m.FailCalls < 0 || m.MessageTuples < 0 {
		return errors.New("metadata counts must not be negative")
	}
	if _, err := m.failCode(); err != nil {
		return err
	}
	return nil
}

func (m MetadataOptions) failCode() (codes.Code, error) {
	if m.FailWith == "" {
		return codes.OK, nil
	}
	var c codes.Code
	if err := c.UnmarshalJSON([]byte(`"` + m.FailWith + `"`)); err != nil {
		return codes.OK, fmt.Errorf("failWith %q is no gRPC code: %w", m.FailWith, err)
	}
	return c, nil
}

func (o Options) size(n int64) (int64, error) {
	r := o.RoundTo
	if r == 0 {
		r = defaultRoundTo
	}
	if n <= 0 {
		n = r
	}
	if n > 1<<50 {
		return 0, fmt.Errorf("size %d is above 1 PiB", n)
	}
	n = (n + r - 1) / r * r
	if n <= o.ShortBy {
		return 0, fmt.Errorf("size %d is not above shortBy %d", n, o.ShortBy)
	}
	return n, nil
}

// WriteOptions makes o the options of the driver whose state is in dir.
func WriteOptions(dir string, o Options) error {
	if err := o.Validate(); err != nil {
		return err
	}
	b, err := json.MarshalIndent(o, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(filepath.Join(dir, "options.json"), b)
}

// ReadOptions reads the options of the driver whose state is in dir; without a file they
// are the zero value.
func ReadOptions(dir string) (Options, error) {
	var o Options
	b, err := os.ReadFile(filepath.Join(dir, "options.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return o, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &o)
	}
	if err == nil {
		err = o.Validate()
	}
	if err != nil {
		return o, fmt.Errorf("driver options: %w", err)
	}
	return o, nil
}

func replaceFile(path string, b []byte) error {
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

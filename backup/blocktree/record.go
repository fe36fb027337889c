package blocktree

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/plain"
)

const (
	// DiskFile is the name of the disk in a point's directory.
	DiskFile = "disk.img"
	// StreamFile is its name if the point holds a stream.
	StreamFile = "stream"
	// RecordFile is the name of the record beside it.
	RecordFile = "varve.json"

	// FormatMajor is the version of the format this code writes. A reader
	// accepts any minor version and refuses another major one.
	FormatMajor = 1
	formatMinor = 0

	// MaxRecordBytes bounds a record when it is read.
	MaxRecordBytes = 16 << 20
)

// ErrNewerFormat means that a newer version of Varve wrote a record that this one cannot
// read.
var ErrNewerFormat = errors.New("written by a newer version of Varve; upgrade to read it")

// Kinds of recovery point.
const (
	KindFull        = "full"
	KindIncremental = "incremental"
)

// ContentStream is the content of a point that holds a stream of bytes, such as the output of
// a program: of any length, cut by Kopia's splitter, without blocks.
const ContentStream = "stream"

// Record is varve.json: all metadata of a recovery point. It is authoritative; the manifest's
// tags only repeat what lists need. Extra keeps fields that a reader does not know.
type Record struct {
	Format     string    `json:"format"` // "varve/MAJOR.MINOR"
	ID         string    `json:"id"`     // 128 random bits in hexadecimal, of the point itself
	Generation int64     `json:"generation"`
	Parent     string    `json:"parent,omitempty"` // ID; may dangle once the parent is deleted
	Kind       string    `json:"kind"`
	Namespace  string    `json:"namespace"`
	Name       string    `json:"name"`
	Cluster    string    `json:"cluster"`
	Time       time.Time `json:"time"`  // the moment whose state the point holds
	Start      time.Time `json:"start"` // of the run
	End        time.Time `json:"end"`

	// Content is what the bytes are: empty for a disk, ContentStream for a stream.
	Content     string `json:"content,omitempty"`
	Size        int64  `json:"size"`      // bytes of the disk, or of the stream
	BlockSize   int64  `json:"blockSize"` // bytes; 0 for a stream
	Root        string `json:"root"`      // object of disk.img
	ZeroBlock   string `json:"zeroBlock,omitempty"`
	ZeroSegment string `json:"zeroSegment,omitempty"`
	Source      string `json:"source,omitempty"` // where changed blocks came from: full, compare, extents, ...
	ChangeID    string `json:"changeID,omitempty"`
	// SnapshotHandle is the storage's name of the snapshot that was read. For most storages
	// the change ID is the same.
	SnapshotHandle string `json:"snapshotHandle,omitempty"`
	VolumeHandle   string `json:"volumeHandle,omitempty"`
	// Run names the run that made the point, if that may be repeated: another attempt finds by it
	// what an earlier one made.
	Run string `json:"run,omitempty"`

	// NotCrashConsistent means that the disk was mounted read-write while it was read: the
	// point mixes moments.
	NotCrashConsistent bool `json:"notCrashConsistent,omitempty"`
	// Consistency is how the moment was made; nil if unknown.
	Consistency *Consistency `json:"consistency,omitempty"`
	// Group is the group of the point; nil for none.
	Group *Group `json:"group,omitempty"`
	// ReadErrors are ranges that could not be read and were stored as zeroes.
	ReadErrors []Range `json:"readErrors,omitempty"`
	// Disk is the identity of the disk that was read; nil in points of older versions.
	Disk *DiskIdentity `json:"disk,omitempty"`
	// Lineage is the ID of the first point of this disk; empty for the volume's first disk.
	// LineageReason, in that point, is why the lineage began.
	Lineage       string `json:"lineage,omitempty"`
	LineageReason string `json:"lineageReason,omitempty"`
	// FileSystem is the type found in the superblock, if any.
	FileSystem string `json:"fileSystem,omitempty"`
	// Claim is the Kubernetes claim that was backed up; nil for other disks.
	Claim *Claim `json:"claim,omitempty"`

	Stats     Stats      `json:"stats"`
	SpotCheck *SpotCheck `json:"spotCheck,omitempty"`
	// Fallbacks are the steps from the requested source of changed blocks to the one that
	// answered, in order.
	Fallbacks   []Fallback `json:"fallbacks,omitempty"`
	Notes       []string   `json:"notes,omitempty"`
	ToolVersion string     `json:"toolVersion,omitempty"`

	// Extra holds the fields of newer minor versions.
	Extra map[string]json.RawMessage `json:"-"`
}

// Claim is what a restore needs to know of the PersistentVolumeClaim of a point. Its name and
// namespace are the volume's.
type Claim struct {
	UID          string   `json:"uid,omitempty"`
	NamespaceUID string   `json:"namespaceUID,omitempty"` // of its namespace: a new namespace of the same name has another
	VolumeMode   string   `json:"volumeMode"`             // Block or Filesystem
	RequestBytes int64    `json:"requestBytes"`           // requested by the claim
	Capacity     int64    `json:"capacity"`               // of its PersistentVolume, in bytes
	StorageClass string   `json:"storageClass,omitempty"`
	Driver       string   `json:"driver,omitempty"`
	AccessModes  []string `json:"accessModes,omitempty"`
}

// Range is a part of a disk, in bytes.
type Range struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// End is the offset of the first byte after the range.
func (r Range) End() int64 { return r.Offset + r.Length }

// Stats is what a run processed.
type Stats struct {
	Reported   int64         `json:"reported"`   // bytes named by the source of changed blocks
	Read       int64         `json:"read"`       // bytes read from the disk
	Changed    int64         `json:"changed"`    // bytes in blocks that differ from the parent
	Zero       int64         `json:"zero"`       // bytes of those that are zeroes
	Uploaded   int64         `json:"uploaded"`   // bytes sent to storage, indexes included
	NewBlocks  int64         `json:"newBlocks"`  // blocks that differ and are not zero
	Segments   int64         `json:"segments"`   // segment indexes written
	Duration   time.Duration `json:"durationNs"` // of the run
	Checkpoint int64         `json:"checkpoints,omitempty"`
}

// Fallback is a step from one source of changed blocks to the next.
type Fallback struct {
	From   string `json:"from"`             // name of the source given up
	To     string `json:"to"`               // name of the one asked next
	Reason string `json:"reason"`           // a stable code; docs/cbt-csi.md lists them
	Detail string `json:"detail,omitempty"` // for people
}

// SpotCheck is how far the source of changed blocks was tested.
type SpotCheck struct {
	Blocks      int64   `json:"blocks"`          // blocks reported unchanged, read and compared
	Bytes       int64   `json:"bytes,omitempty"` // of those
	Candidates  int64   `json:"candidates"`      // blocks reported unchanged
	Probability float64 `json:"probability"`     // of detecting changes in one of a thousand of them
	Stripe      int64   `json:"stripe"`          // which stripe of the rotation was read
	Stripes     int64   `json:"stripes"`         // how many runs cover the whole disk
	Limit       string  `json:"limit,omitempty"` // what limited the sample below the requested share: bytes or time
}

// IsStream reports whether the point holds a stream rather than a disk.
func (r *Record) IsStream() bool { return r.Content == ContentStream }

// File returns the name of the disk, or stream, in the point's directory.
func (r *Record) File() string {
	if r.IsStream() {
		return StreamFile
	}
	return DiskFile
}

// OpenRoot returns the root of the point's tree.
func (r *Record) OpenRoot() (Root, error) {
	root := Root{Size: r.Size, Block: r.BlockSize}
	var err error
	if root.Object, err = repository.ParseObjectID(r.Root); err != nil {
		return root, fmt.Errorf("record of %s: root: %w", r.ID, err)
	}
	if r.ZeroBlock != "" {
		if root.Zero, err = repository.ParseObjectID(r.ZeroBlock); err != nil {
			return root, fmt.Errorf("record of %s: zero block: %w", r.ID, err)
		}
	}
	if r.ZeroSegment != "" {
		if root.ZeroSeg, err = repository.ParseObjectID(r.ZeroSegment); err != nil {
			return root, fmt.Errorf("record of %s: zero segment: %w", r.ID, err)
		}
	}
	return root, nil
}

// SetRoot records a tree.
func (r *Record) SetRoot(root Root) {
	r.Size, r.BlockSize, r.Root = root.Size, root.Block, root.Object.String()
	r.ZeroBlock, r.ZeroSegment = "", ""
	if root.Zero != (repository.ObjectID{}) {
		r.ZeroBlock = root.Zero.String()
	}
	if root.ZeroSeg != (repository.ObjectID{}) {
		r.ZeroSegment = root.ZeroSeg.String()
	}
}

// Encode writes the record as JSON, Extra included.
func (r *Record) Encode() ([]byte, error) {
	r.Format = fmt.Sprintf("varve/%d.%d", FormatMajor, formatMinor)
	type plain Record
	p, err := json.Marshal((*plain)(r))
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(p, &fields); err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	for k, v := range r.Extra {
		if _, known := fields[k]; !known {
			fields[k] = v
		}
	}
	out, err := json.MarshalIndent(fields, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	return append(out, '\n'), nil
}

// DecodeRecord reads varve.json.
func DecodeRecord(p []byte) (*Record, error) {
	var head struct {
		Format string `json:"format"`
	}
	if err := json.Unmarshal(p, &head); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	major, ok := strings.CutPrefix(head.Format, "varve/")
	major, _, _ = strings.Cut(major, ".")
	n, err := strconv.Atoi(major)
	if !ok || err != nil || n < 1 {
		return nil, fmt.Errorf("record: format %q is not Varve's", plain.Clip(head.Format, maxLabel))
	}
	if n > FormatMajor {
		return nil, fmt.Errorf("record of format %q: %w", plain.Clip(head.Format, maxLabel), ErrNewerFormat)
	}
	type plain Record
	var r plain
	if err := json.Unmarshal(p, &r); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	rec := (*Record)(&r)
	if err := rec.keepExtra(p); err != nil {
		return nil, err
	}
	if err := rec.Check(); err != nil {
		return nil, err
	}
	return rec, nil
}

func (r *Record) keepExtra(p []byte) error {
	all := map[string]json.RawMessage{}
	if err := json.Unmarshal(p, &all); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	known := map[string]json.RawMessage{}
	type plain Record
	own, err := json.Marshal((*plain)(r))
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	if err := json.Unmarshal(own, &known); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	for _, k := range slices.Sorted(maps.Keys(all)) {
		if _, ok := known[k]; !ok && !bytes.Equal(all[k], []byte("null")) && !optionalField(k) {
			if r.Extra == nil {
				r.Extra = map[string]json.RawMessage{}
			}
			r.Extra[k] = all[k]
		}
	}
	return nil
}

// optionalField reports whether k is a field of Record that its own encoding
// leaves out when empty, so that an empty value in a file is not an unknown
// field.
func optionalField(k string) bool {
	switch k {
	case "parent", "content", "zeroBlock", "zeroSegment", "source", "changeID", "volumeHandle",
		"snapshotHandle", "run", "notCrashConsistent", "consistency", "group", "readErrors", "disk", "lineage", "lineageReason", "fileSystem", "claim", "spotCheck", "fallbacks", "notes", "toolVersion":
		return true
	}
	return false
}

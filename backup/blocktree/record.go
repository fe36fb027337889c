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
)

const (
	// DiskFile is the name of the disk in a point's directory.
	DiskFile = "disk.img"
	// RecordFile is the name of the record beside it.
	RecordFile = "varve.json"

	// FormatMajor is the version of the format this code writes. A reader
	// accepts any minor version and refuses another major one.
	FormatMajor = 1
	formatMinor = 0

	// MaxRecordBytes bounds a record when it is read.
	MaxRecordBytes = 16 << 20
)

// ErrNewerFormat means that a newer version of Varve wrote a record in a way
// that this one cannot read.
var ErrNewerFormat = errors.New("written by a newer version of Varve; upgrade to read it")

// Kinds of recovery point.
const (
	KindFull        = "full"
	KindIncremental = "incremental"
)

// Record is varve.json: all that is known of a recovery point beside its bytes.
// It is authoritative; the manifest's tags only repeat what lists need. Fields
// that a reader does not know are kept by Extra.
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

	Size        int64  `json:"size"`      // bytes of the disk
	BlockSize   int64  `json:"blockSize"` // bytes
	Root        string `json:"root"`      // object of disk.img
	ZeroBlock   string `json:"zeroBlock,omitempty"`
	ZeroSegment string `json:"zeroSegment,omitempty"`
	Source      string `json:"source,omitempty"` // where changed blocks came from: full, compare, extents, ...
	ChangeID    string `json:"changeID,omitempty"`
	// SnapshotHandle is what the storage calls the snapshot that was read. For most
	// storages the change ID is the same.
	SnapshotHandle string `json:"snapshotHandle,omitempty"`
	VolumeHandle   string `json:"volumeHandle,omitempty"`

	// NotCrashConsistent is set when the disk was mounted read-write while it
	// was read: the point mixes moments.
	NotCrashConsistent bool `json:"notCrashConsistent,omitempty"`
	// ReadErrors are ranges that could not be read and were stored as zeroes.
	ReadErrors []Range `json:"readErrors,omitempty"`
	// Disk is what identified the disk that was read; nil in points of older versions.
	Disk *DiskIdentity `json:"disk,omitempty"`
	// Lineage is the ID of the point with which the points of this disk begin; empty
	// for the first disk that the volume had. LineageReason says, in that point, why.
	Lineage       string `json:"lineage,omitempty"`
	LineageReason string `json:"lineageReason,omitempty"`
	// FileSystem is the type found in the superblock, if any.
	FileSystem string `json:"fileSystem,omitempty"`
	// Claim is the Kubernetes claim that was backed up; nil for other disks.
	Claim *Claim `json:"claim,omitempty"`

	Stats     Stats      `json:"stats"`
	SpotCheck *SpotCheck `json:"spotCheck,omitempty"`
	// Fallbacks are the steps from the source of changed blocks that was wanted to
	// the one that answered, in order.
	Fallbacks   []Fallback `json:"fallbacks,omitempty"`
	Notes       []string   `json:"notes,omitempty"`
	ToolVersion string     `json:"toolVersion,omitempty"`

	// Extra holds the fields of newer minor versions.
	Extra map[string]json.RawMessage `json:"-"`
}

// Claim is what a restore wants to know of the PersistentVolumeClaim that a point was
// made of. Its name and namespace are the volume's.
type Claim struct {
	UID          string   `json:"uid,omitempty"`
	NamespaceUID string   `json:"namespaceUID,omitempty"` // of its namespace: one that is made again has another
	VolumeMode   string   `json:"volumeMode"`             // Block or Filesystem
	RequestBytes int64    `json:"requestBytes"`           // what the claim asked for
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

// Stats is what a run cost.
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

// SpotCheck tells how far the source of changed blocks was tested.
type SpotCheck struct {
	Blocks      int64   `json:"blocks"`          // reported unchanged, read and compared
	Bytes       int64   `json:"bytes,omitempty"` // of those
	Candidates  int64   `json:"candidates"`      // blocks reported unchanged
	Probability float64 `json:"probability"`     // of detecting a lie about one block in a thousand of them
	Stripe      int64   `json:"stripe"`          // which stripe of the rotation was read
	Stripes     int64   `json:"stripes"`         // how many runs cover the whole disk
	Limit       string  `json:"limit,omitempty"` // what kept the sample below the share that was asked for: bytes or time
}

// OpenRoot tells how to open the point's tree.
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
		return nil, fmt.Errorf("record: format %q is not Varve's", head.Format)
	}
	if n > FormatMajor {
		return nil, fmt.Errorf("record of format %q: %w", head.Format, ErrNewerFormat)
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
	switch {
	case !ValidID(rec.ID):
		return nil, fmt.Errorf("record: %q is not the ID of a recovery point", rec.ID)
	case rec.Parent != "" && !ValidID(rec.Parent):
		return nil, fmt.Errorf("record of %s: its parent %q is not the ID of a recovery point", rec.ID, rec.Parent)
	case rec.Lineage != "" && !ValidID(rec.Lineage):
		return nil, fmt.Errorf("record of %s: its lineage %q is not the ID of a recovery point", rec.ID, rec.Lineage)
	case rec.Generation < 1:
		return nil, fmt.Errorf("record of %s: generation %d", rec.ID, rec.Generation)
	}
	if err := (Layout{Size: rec.Size, BlockSize: rec.BlockSize}).Check(); err != nil {
		return nil, fmt.Errorf("record of %s: %w", rec.ID, err)
	}
	return rec, nil
}

// ValidID reports whether s is the ID of a recovery point: 32 lower-case hexadecimal
// digits. IDs name directories, exports and records, and others may write what stands for
// one in a repository.
func ValidID(s string) bool {
	return len(s) == 32 && strings.Trim(s, "0123456789abcdef") == ""
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
	case "parent", "zeroBlock", "zeroSegment", "source", "changeID", "volumeHandle",
		"snapshotHandle", "notCrashConsistent", "readErrors", "disk", "lineage", "lineageReason", "fileSystem", "claim", "spotCheck", "fallbacks", "notes", "toolVersion":
		return true
	}
	return false
}

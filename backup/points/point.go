package points

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/plain"
)

// Point is a recovery point with what lists show of it.
type Point struct {
	ManifestID string
	// Twins are the other manifests of this point, which two changes of its pins at the same
	// moment leave; nil for none.
	Twins      []string
	ID         string // 32 hexadecimal digits; the manifest ID of a foreign point
	Volume     Volume
	Generation int64
	Parent     string // ID of the point that it is an increment of; may be deleted
	Kind       string
	Time       time.Time
	Ended      time.Time // end of its backup
	Size       int64     // bytes
	BlockSize  int64     // bytes; 0 for a stream and for a foreign point
	Stream     bool      // the bytes are a stream, not a disk
	// Lineage is the ID of the first point of this disk; empty for the volume's first disk.
	Lineage      string
	ChangeID     string
	VolumeHandle string
	// SnapshotHandle is the storage's name of the snapshot that was read.
	SnapshotHandle string
	// Run names the run that made it, as in the record; empty if none was recorded.
	Run string
	// NamespaceUID is the UID of the claim's Kubernetes namespace; empty for other disks, and
	// if it was not recorded.
	NamespaceUID string
	// Unread is the number of bytes that could not be read and were stored as zeroes; the
	// record has the ranges.
	Unread int64
	// NotCrashConsistent means that the disk was written to while it was read.
	NotCrashConsistent bool
	// Consistency is the level in the record (blocktree.CrashConsistent, ...), or empty.
	Consistency string
	// OneMoment means that this is the consistency of all points of the group together.
	OneMoment bool
	// Group is the group of this point; nil for none. It is shared and must not be changed.
	Group      *blocktree.Group
	Pins       []string // exactly as in the manifests, for unpin
	Incomplete string   // why this is not a recovery point; empty for one
	// Foreign names the program that wrote the snapshot, which holds a disk image that can be
	// read; empty for Varve's own.
	Foreign string

	Root    repository.ObjectID // directory, or the file itself
	rootDir bool
}

// Tags of a snapshot manifest. They repeat the record for lists. Kopia's "snapshot migrate"
// drops them; then the record is read.
const (
	tagFormat     = "varve"
	TagID         = "varve-id"
	TagGeneration = "varve-generation"
	tagParent     = "varve-parent"
	tagKind       = "varve-kind"
	tagTime       = "varve-time"
	tagSize       = "varve-size"
	tagBlockSize  = "varve-block-size"
	tagChangeID   = "varve-change-id"
	tagHandle     = "varve-volume-handle"
	tagSnapshot   = "varve-snapshot-handle"
	tagRun        = "varve-run"
	tagNamespace  = "varve-namespace-uid"
	tagUnread     = "varve-unread"
	tagLive       = "varve-live"
	tagLineage    = "varve-lineage"

	tagContent     = "varve-content"
	tagConsistency = "varve-consistency"
	tagOneMoment   = "varve-one-moment"
	// Of a group; spaces separate the members.
	TagGroup        = "varve-group"
	TagGroupName    = "varve-group-name"
	tagGroupTime    = "varve-group-time"
	tagGroupMembers = "varve-group-members"
	// TagRunPID marks the incomplete manifest of a run, which has neither ID nor record.
	TagRunPID = "varve-run-pid"
)

// ErrDamaged means that a recovery point, or data that leads to it, cannot be read as
// written.
var ErrDamaged = errors.New("damaged")

// Tags returns the tags of the snapshot with a record.
func Tags(r *blocktree.Record) map[string]string {
	tags := map[string]string{
		tagFormat:     strconv.Itoa(blocktree.FormatMajor),
		TagID:         r.ID,
		TagGeneration: strconv.FormatInt(r.Generation, 10),
		tagKind:       r.Kind,
		tagTime:       r.Time.UTC().Format(time.RFC3339Nano),
		tagSize:       strconv.FormatInt(r.Size, 10),
		tagBlockSize:  strconv.FormatInt(r.BlockSize, 10),
	}
	for k, v := range map[string]string{tagParent: r.Parent, tagChangeID: r.ChangeID, tagHandle: r.VolumeHandle, tagSnapshot: r.SnapshotHandle, tagRun: r.Run, tagNamespace: namespaceUID(r), tagLineage: r.Lineage, tagContent: r.Content} {
		if v != "" {
			tags[k] = v
		}
	}
	if n := unreadBytes(r); n > 0 {
		tags[tagUnread] = strconv.FormatInt(n, 10)
	}
	if r.NotCrashConsistent {
		tags[tagLive] = "true"
	}
	if r.Consistency != nil {
		tags[tagConsistency] = r.Consistency.Level
		if r.Consistency.OneMoment {
			tags[tagOneMoment] = "true"
		}
	}
	if g := r.Group; g != nil {
		tags[TagGroup], tags[TagGroupName] = g.ID, g.Name
		tags[tagGroupTime], tags[tagGroupMembers] = g.Time.UTC().Format(time.RFC3339Nano), strings.Join(g.Members, " ")
	}
	return tags
}

// ErrStream means that a recovery point holds a stream, and a disk is needed.
var ErrStream = errors.New("the recovery point holds a stream of bytes, not a disk")

// NeedDisk returns ErrStream for a point that holds a stream.
func (p *Point) NeedDisk() error {
	if !p.Stream {
		return nil
	}
	return fmt.Errorf("%s: %w; 'varve cat %s' or 'varve restore %s FILE' gives it back", p.Name(), ErrStream, p.Name(), p.Name())
}

// errNoTags means that a manifest has no usable tags and its record must be read.
var errNoTags = errors.New("no tags")

func pointFromSnapshot(s *repository.Snapshot) *Point {
	return &Point{
		ManifestID: s.ManifestID,
		Volume:     Volume{Namespace: s.Source.User, Name: strings.TrimPrefix(s.Source.Path, "/"), Cluster: s.Source.Host},
		Time:       s.Start,
		Ended:      s.End,
		Pins:       s.Pins,
		Incomplete: plain.Clip(s.Incomplete, MaxNote),
		Root:       s.Root,
		rootDir:    s.RootIsDir,
	}
}

// FromRecord returns the point of a snapshot with its record.
func FromRecord(s *repository.Snapshot, r *blocktree.Record) *Point {
	p := pointFromSnapshot(s)
	p.fillFromRecord(r)
	return p
}

// fillFromTags fills the point from the tags, which are checked like a record.
func (p *Point) fillFromTags(tags map[string]string) error {
	if tags[tagFormat] == "" {
		return errNoTags
	}
	gen, err1 := strconv.ParseInt(tags[TagGeneration], 10, 64)
	size, err2 := strconv.ParseInt(tags[tagSize], 10, 64)
	block, err3 := strconv.ParseInt(tags[tagBlockSize], 10, 64)
	t, err4 := time.Parse(time.RFC3339Nano, tags[tagTime])
	if errors.Join(err1, err2, err3, err4) != nil {
		return errNoTags
	}
	r := blocktree.Record{
		ID: tags[TagID], Generation: gen, Parent: tags[tagParent], Kind: tags[tagKind], Time: t, Size: size, BlockSize: block,
		ChangeID: tags[tagChangeID], VolumeHandle: tags[tagHandle], SnapshotHandle: tags[tagSnapshot], Run: tags[tagRun],
		NotCrashConsistent: tags[tagLive] != "", Lineage: tags[tagLineage],
		Content: tags[tagContent],
	}
	if uid := tags[tagNamespace]; uid != "" {
		r.Claim = &blocktree.Claim{NamespaceUID: uid}
	}
	if n := tags[tagUnread]; n != "" {
		unread, err := strconv.ParseInt(n, 10, 64)
		if err != nil {
			return errNoTags
		}
		r.ReadErrors = []blocktree.Range{{Length: unread}} // only the sum is used
	}
	if level := tags[tagConsistency]; level != "" {
		r.Consistency = &blocktree.Consistency{Level: level, OneMoment: tags[tagOneMoment] != ""}
	}
	var err error
	if r.Group, err = groupFromTags(tags); err != nil || r.Check() != nil {
		return errNoTags
	}
	p.fillFromRecord(&r)
	return nil
}

// unreadBytes returns how many bytes could not be read.
func unreadBytes(r *blocktree.Record) (n int64) {
	for _, bad := range r.ReadErrors {
		n += bad.Length
	}
	return n
}

func (p *Point) fillFromRecord(r *blocktree.Record) {
	p.ID, p.Generation, p.Size, p.BlockSize, p.Time = r.ID, r.Generation, r.Size, r.BlockSize, r.Time
	p.Parent, p.Kind, p.ChangeID, p.VolumeHandle = r.Parent, r.Kind, r.ChangeID, r.VolumeHandle
	p.NamespaceUID, p.Run = namespaceUID(r), r.Run
	p.SnapshotHandle, p.NotCrashConsistent, p.Unread = r.SnapshotHandle, r.NotCrashConsistent, unreadBytes(r)
	p.Lineage, p.Stream = r.Lineage, r.IsStream()
	if r.Consistency != nil {
		p.Consistency, p.OneMoment = r.Consistency.Level, r.Consistency.OneMoment
	}
	if r.Group != nil && r.Group.Has(p.Volume.String()) { // else a copy under another name
		p.Group = r.Group
	}
}

func namespaceUID(r *blocktree.Record) string {
	if r.Claim == nil {
		return ""
	}
	return r.Claim.NamespaceUID
}

// timeText formats a point's time as in its name: UTC, to the second, with milliseconds if it
// has them.
func timeText(t time.Time) string {
	t = t.UTC()
	if t.Nanosecond() == 0 {
		return t.Format("2006-01-02T15:04:05Z")
	}
	return t.Format("2006-01-02T15:04:05.000Z")
}

// Name returns the point's name, namespace/name@TIME.
func (p *Point) Name() string {
	if p.Foreign != "" {
		return fmt.Sprintf("%s@%s:%s@%s", p.Volume.Namespace, p.Volume.Cluster, "/"+p.Volume.Name, timeText(p.Time))
	}
	return p.Volume.String() + "@" + timeText(p.Time)
}

// FullName returns the name with its cluster, which is valid in commands of every cluster.
func (p *Point) FullName() string {
	if p.Foreign != "" {
		return p.Name()
	}
	return p.Volume.Cluster + ":" + p.Name()
}

// NameIn returns the name of this point for commands of a cluster: without the cluster for
// its own points.
func (p *Point) NameIn(cluster string) string {
	if p.Volume.Cluster == cluster {
		return p.Name()
	}
	return p.FullName()
}

// ShortID returns the first digits of the ID, as lists show them.
func (p *Point) ShortID() string { return p.ID[:min(len(p.ID), 12)] }

// Manifests returns the IDs of all manifests of the point.
func (p *Point) Manifests() []string { return slices.Concat([]string{p.ManifestID}, p.Twins) }

// NewID returns a random ID for a point.
func NewID() string {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil { // never fails (crypto/rand)
		panic(err)
	}
	return hex.EncodeToString(b[:])
}

// LoadRecord reads a point's record. It fails for a foreign point.
func LoadRecord(ctx context.Context, r *repository.Repository, p *Point) (*blocktree.Record, error) {
	if p.Foreign != "" {
		return nil, fmt.Errorf("%s was written by %s and has no record", p.Name(), p.Foreign)
	}
	rec, err := loadRecord(ctx, r, p.Root)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	return rec, nil
}

// ErrNoRecord means that a directory has no record.
var ErrNoRecord = errors.New("no " + blocktree.RecordFile)

func loadRecord(ctx context.Context, r *repository.Repository, dir repository.ObjectID) (*blocktree.Record, error) {
	files, err := r.ReadDirectory(ctx, dir)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		if f.Name == blocktree.RecordFile && !f.Dir {
			b, err := r.ReadFile(ctx, f.Object, blocktree.MaxRecordBytes)
			if err != nil {
				return nil, err
			}
			return blocktree.DecodeRecord(b)
		}
	}
	return nil, ErrNoRecord
}

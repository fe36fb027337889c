package backup

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
)

// Point is a recovery point as a list shows it.
type Point struct {
	ManifestID string
	ID         string // 32 hexadecimal digits; a foreign point's is its manifest ID
	Volume     Volume
	Generation int64
	Parent     string // ID of the point it was an increment of; may be gone
	Kind       string
	Time       time.Time
	Size       int64 // bytes
	BlockSize  int64 // bytes; 0 for a foreign point
	// Lineage is the ID of the point with which the points of this disk begin; empty
	// for the first disk that the volume had.
	Lineage      string
	ChangeID     string
	VolumeHandle string
	// SnapshotHandle is what the storage calls the snapshot that was read.
	SnapshotHandle string
	// NamespaceUID is that of the Kubernetes namespace the claim was in; empty for other
	// disks, and where it was not recorded.
	NamespaceUID string
	// Unread is how many bytes could not be read when the point was made, and were stored
	// as zeroes; the record has the ranges.
	Unread int64
	// NotCrashConsistent is set when the disk was written to while it was read.
	NotCrashConsistent bool
	Pins               []string
	Incomplete         string // why this is not a recovery point; empty for one
	// Foreign names the program that wrote a snapshot that is not Varve's, but
	// holds a disk image that can be read; empty for Varve's own.
	Foreign string

	root    repository.ObjectID // directory, or the file itself
	rootDir bool
}

// Tags of a snapshot manifest. They repeat the record for lists; kopia's
// "snapshot migrate" drops them, and they are read from the record again.
const (
	tagFormat     = "varve"
	tagID         = "varve-id"
	tagGeneration = "varve-generation"
	tagParent     = "varve-parent"
	tagKind       = "varve-kind"
	tagTime       = "varve-time"
	tagSize       = "varve-size"
	tagBlockSize  = "varve-block-size"
	tagChangeID   = "varve-change-id"
	tagHandle     = "varve-volume-handle"
	tagSnapshot   = "varve-snapshot-handle"
	tagNamespace  = "varve-namespace-uid"
	tagUnread     = "varve-unread"
	tagLive       = "varve-live"
	tagLineage    = "varve-lineage"
)

func recordTags(r *blocktree.Record) map[string]string {
	tags := map[string]string{
		tagFormat:     strconv.Itoa(blocktree.FormatMajor),
		tagID:         r.ID,
		tagGeneration: strconv.FormatInt(r.Generation, 10),
		tagKind:       r.Kind,
		tagTime:       r.Time.UTC().Format(time.RFC3339Nano),
		tagSize:       strconv.FormatInt(r.Size, 10),
		tagBlockSize:  strconv.FormatInt(r.BlockSize, 10),
	}
	for k, v := range map[string]string{tagParent: r.Parent, tagChangeID: r.ChangeID, tagHandle: r.VolumeHandle, tagSnapshot: r.SnapshotHandle, tagNamespace: namespaceUID(r), tagLineage: r.Lineage} {
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
	return tags
}

// errNoTags means that a manifest has no usable tags and its record must be read.
var errNoTags = errors.New("no tags")

func pointFromSnapshot(s *repository.Snapshot) *Point {
	return &Point{
		ManifestID: s.ManifestID,
		Volume:     Volume{Namespace: s.Source.User, Name: strings.TrimPrefix(s.Source.Path, "/"), Cluster: s.Source.Host},
		Time:       s.Start,
		Pins:       s.Pins,
		Incomplete: s.Incomplete,
		root:       s.Root,
		rootDir:    s.RootIsDir,
	}
}

func (p *Point) fillFromTags(tags map[string]string) error {
	id := tags[tagID]
	if tags[tagFormat] == "" || !blocktree.ValidID(id) {
		return errNoTags
	}
	for _, other := range []string{tags[tagParent], tags[tagLineage]} {
		if other != "" && !blocktree.ValidID(other) {
			return errNoTags
		}
	}
	if kind := tags[tagKind]; kind != blocktree.KindFull && kind != blocktree.KindIncremental {
		return errNoTags
	}
	gen, err1 := strconv.ParseInt(tags[tagGeneration], 10, 64)
	size, err2 := strconv.ParseInt(tags[tagSize], 10, 64)
	block, err3 := strconv.ParseInt(tags[tagBlockSize], 10, 64)
	t, err4 := time.Parse(time.RFC3339Nano, tags[tagTime])
	if errors.Join(err1, err2, err3, err4) != nil || gen < 1 {
		return errNoTags
	}
	p.ID, p.Generation, p.Size, p.BlockSize, p.Time = id, gen, size, block, t
	p.Parent, p.Kind, p.ChangeID, p.VolumeHandle = tags[tagParent], tags[tagKind], tags[tagChangeID], tags[tagHandle]
	p.NamespaceUID = tags[tagNamespace]
	p.SnapshotHandle, p.NotCrashConsistent, p.Lineage = tags[tagSnapshot], tags[tagLive] != "", tags[tagLineage]
	if n := tags[tagUnread]; n != "" {
		var err error
		if p.Unread, err = strconv.ParseInt(n, 10, 64); err != nil || p.Unread < 0 {
			return errNoTags
		}
	}
	return nil
}

// unreadBytes is how many bytes of a point are zeroes for want of better.
func unreadBytes(r *blocktree.Record) (n int64) {
	for _, bad := range r.ReadErrors {
		n += bad.Length
	}
	return n
}

func (p *Point) fillFromRecord(r *blocktree.Record) {
	p.ID, p.Generation, p.Size, p.BlockSize, p.Time = r.ID, r.Generation, r.Size, r.BlockSize, r.Time
	p.Parent, p.Kind, p.ChangeID, p.VolumeHandle = r.Parent, r.Kind, r.ChangeID, r.VolumeHandle
	p.NamespaceUID = namespaceUID(r)
	p.SnapshotHandle, p.NotCrashConsistent, p.Unread = r.SnapshotHandle, r.NotCrashConsistent, unreadBytes(r)
	p.Lineage = r.Lineage
}

func namespaceUID(r *blocktree.Record) string {
	if r.Claim == nil {
		return ""
	}
	return r.Claim.NamespaceUID
}

// timeText is how a point's time is written in its name: UTC, to the second,
// with milliseconds where the point has them.
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

// FullName returns the name with the cluster before it, which means this point
// to every command of every cluster.
func (p *Point) FullName() string {
	if p.Foreign != "" {
		return p.Name()
	}
	return p.Volume.Cluster + ":" + p.Name()
}

// NameIn returns the name that means this point in a cluster: without the
// cluster for its own points.
func (p *Point) NameIn(cluster string) string {
	if p.Volume.Cluster == cluster {
		return p.Name()
	}
	return p.FullName()
}

// ShortID returns the first digits of the ID, as lists show them.
func (p *Point) ShortID() string { return p.ID[:min(len(p.ID), 12)] }

func newID() string {
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
	rec, err := loadRecord(ctx, r, p.root)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	return rec, nil
}

var errNoRecord = errors.New("no " + blocktree.RecordFile)

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
	return nil, errNoRecord
}

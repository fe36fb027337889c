package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotfs"
)

// ErrSnapshotNotFound means that no snapshot manifest has the given ID.
var ErrSnapshotNotFound = snapshot.ErrSnapshotNotFound

// Source is a Kopia snapshot source, userName@host:path.
type Source struct {
	User, Host, Path string
}

// Snapshot is a Kopia snapshot manifest: the part of it that Varve uses. UpdatePins keeps
// fields that a stock client wrote and Varve does not know.
type Snapshot struct {
	ManifestID  string
	Source      Source
	Start, End  time.Time
	Description string
	Incomplete  string // why it is not a recovery point; empty for a complete one
	Root        ObjectID
	RootIsDir   bool
	RootSize    int64 // bytes, when the root is a single file
	Tags        map[string]string
	Pins        []string
}

// File is an entry of a snapshot's root directory.
type File struct {
	Name    string
	Size    int64 // bytes
	ModTime time.Time
	Mode    uint32 // permission bits
	Object  ObjectID
	Dir     bool
}

// SnapshotInfo is what a manifest's labels say, without reading the manifest.
type SnapshotInfo struct {
	ManifestID string
	Source     Source
	Written    time.Time // when the manifest was written
	Tags       map[string]string
}

const tagPrefix = "tag:" // kopia cli/command_snapshot_create.go

// ListSnapshots lists the snapshot manifests of one source, or of all if src is nil. It
// reads labels only.
func (r *Repository) ListSnapshots(ctx context.Context, src *Source) ([]SnapshotInfo, error) {
	labels := map[string]string{manifest.TypeLabelKey: snapshot.ManifestType}
	if src != nil {
		labels[snapshot.UsernameLabel] = src.User
		labels[snapshot.HostnameLabel] = src.Host
		labels[snapshot.PathLabel] = src.Path
	}
	found, err := r.findManifests(ctx, labels)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	out := make([]SnapshotInfo, 0, len(found))
	for _, e := range found {
		tags := map[string]string{}
		for k, v := range e.Labels {
			if name, ok := strings.CutPrefix(k, tagPrefix); ok {
				tags[name] = v
			}
		}
		out = append(out, SnapshotInfo{
			ManifestID: string(e.ID),
			Source: Source{
				User: e.Labels[snapshot.UsernameLabel],
				Host: e.Labels[snapshot.HostnameLabel],
				Path: e.Labels[snapshot.PathLabel],
			},
			Written: e.ModTime,
			Tags:    tags,
		})
	}
	return out, nil
}

// LoadSnapshot reads one snapshot manifest. The error is ErrSnapshotNotFound if it was
// deleted.
func (r *Repository) LoadSnapshot(ctx context.Context, manifestID string) (*Snapshot, error) {
	m, err := r.loadManifest(ctx, manifestID)
	if err != nil {
		return nil, err
	}
	return fromManifest(m), nil
}

func fromManifest(m *snapshot.Manifest) *Snapshot {
	s := &Snapshot{
		ManifestID:  string(m.ID),
		Source:      Source{User: m.Source.UserName, Host: m.Source.Host, Path: m.Source.Path},
		Start:       m.StartTime.ToTime().UTC(),
		End:         m.EndTime.ToTime().UTC(),
		Description: m.Description,
		Incomplete:  m.IncompleteReason,
		Tags:        map[string]string{},
		Pins:        slices.Clone(m.Pins),
	}
	for k, v := range m.Tags {
		s.Tags[strings.TrimPrefix(k, tagPrefix)] = v
	}
	if m.RootEntry != nil {
		s.Root = m.RootEntry.ObjectID
		s.RootIsDir = m.RootEntry.Type == snapshot.EntryTypeDirectory
		s.RootSize = m.RootEntry.FileSize
	}
	return s
}

// SaveSnapshot writes the root directory of files and a manifest over it. It
// sets s.ManifestID and s.Root. Nothing is visible before Flush.
func (w *Writer) SaveSnapshot(ctx context.Context, s *Snapshot, files []File) error {
	entry, err := w.writeDirectory(ctx, s.Start, s.Incomplete, files)
	if err != nil {
		return err
	}
	tags := make(map[string]string, len(s.Tags))
	for k, v := range s.Tags {
		tags[tagPrefix+k] = v
	}
	m := &snapshot.Manifest{
		Source:           snapshot.SourceInfo{UserName: s.Source.User, Host: s.Source.Host, Path: s.Source.Path},
		Description:      s.Description,
		StartTime:        fs.UTCTimestampFromTime(s.Start),
		EndTime:          fs.UTCTimestampFromTime(s.End),
		IncompleteReason: s.Incomplete,
		RootEntry:        entry,
		Tags:             tags,
		Pins:             s.Pins,
	}
	m.Stats.TotalFileCount = int32(entry.DirSummary.TotalFileCount)
	m.Stats.TotalFileSize = entry.DirSummary.TotalFileSize
	m.Stats.TotalDirectoryCount = int32(entry.DirSummary.TotalDirCount)
	id, err := snapshot.SaveSnapshot(w.ctx, w.w, m)
	if err != nil {
		return fmt.Errorf("write snapshot manifest: %w", explainWrite(err))
	}
	s.ManifestID, s.Root, s.RootIsDir = string(id), entry.ObjectID, true
	return nil
}

// DeleteSnapshot deletes a manifest; a later maintenance deletes its data, unless another
// snapshot reaches it.
func (w *Writer) DeleteSnapshot(_ context.Context, manifestID string) error {
	return w.deleteManifest(manifestID)
}

// UpdatePins adds and removes pins of a snapshot. As in stock Kopia the
// snapshot gets a new manifest ID, which is returned. Of several manifests, which must differ
// in their pins only, it makes one with the pins of all. That one is always new: two
// processes that each kept an old one, and not the same, would delete both.
func (w *Writer) UpdatePins(ctx context.Context, manifestIDs, add, remove []string) (string, error) {
	var m *snapshot.Manifest
	for _, id := range manifestIDs {
		var next *snapshot.Manifest
		err := w.refreshing(func() (err error) {
			next, err = snapshot.LoadSnapshot(w.ctx, w.w, manifest.ID(id))
			return err
		})
		switch {
		case errors.Is(err, ErrSnapshotNotFound) && len(manifestIDs) > 1:
			continue // deleted since
		case err != nil:
			return "", fmt.Errorf("read snapshot manifest %s: %w", id, err)
		case m == nil:
			m = next
		default:
			m.UpdatePins(next.Pins, nil)
		}
	}
	if m == nil {
		return "", fmt.Errorf("read snapshot manifests %s: %w", strings.Join(manifestIDs, ", "), ErrSnapshotNotFound)
	}
	if !m.UpdatePins(add, remove) && len(manifestIDs) == 1 {
		return manifestIDs[0], nil
	}
	if _, err := snapshot.SaveSnapshot(w.ctx, w.w, m); err != nil {
		return "", fmt.Errorf("update pins of %s: %w", manifestIDs[0], explainWrite(err))
	}
	for _, id := range manifestIDs {
		if err := w.DeleteSnapshot(ctx, id); err != nil {
			return "", err
		}
	}
	return string(m.ID), nil
}

// writeDirectory stores the directory exactly as Kopia would, so that Kopia's consistency
// checks pass.
func (w *Writer) writeDirectory(_ context.Context, modTime time.Time, incomplete string, files []File) (*snapshot.DirEntry, error) {
	var b snapshotfs.DirManifestBuilder
	for _, f := range files {
		b.AddEntry(&snapshot.DirEntry{
			Name:        f.Name,
			Type:        snapshot.EntryTypeFile,
			Permissions: snapshot.Permissions(f.Mode),
			FileSize:    f.Size,
			ModTime:     fs.UTCTimestampFromTime(f.ModTime),
			ObjectID:    f.Object,
		})
	}
	dm := b.Build(fs.UTCTimestampFromTime(modTime), incomplete)
	var buf bytes.Buffer
	if err := json.NewEncoder(&buf).Encode(dm); err != nil {
		return nil, fmt.Errorf("encode directory: %w", err)
	}
	oid, err := w.writeDirect(w.ctx, buf.Bytes(), directoryPrefix, indexCompression)
	if err != nil {
		return nil, fmt.Errorf("write directory: %w", err)
	}
	return &snapshot.DirEntry{
		Type:        snapshot.EntryTypeDirectory,
		Permissions: 0o755,
		ModTime:     fs.UTCTimestampFromTime(modTime),
		ObjectID:    oid,
		DirSummary:  dm.Summary,
	}, nil
}

// maxDirectory bounds a directory read into memory; ours holds two entries,
// and Velero's one.
const maxDirectory = 64 << 20

// ReadDirectory lists a snapshot's root directory.
func (r *Repository) ReadDirectory(ctx context.Context, oid ObjectID) ([]File, error) {
	p, err := r.ReadObject(ctx, oid)
	if err != nil {
		return nil, fmt.Errorf("read directory: %w", err)
	}
	if len(p) > maxDirectory {
		return nil, fmt.Errorf("directory %v is %d bytes long", oid, len(p))
	}
	var dm snapshot.DirManifest
	if err := json.Unmarshal(p, &dm); err != nil {
		return nil, fmt.Errorf("directory %v: %w", oid, err)
	}
	files := make([]File, 0, len(dm.Entries))
	for _, e := range dm.Entries {
		if e == nil {
			return nil, fmt.Errorf("directory %v: empty entry", oid)
		}
		files = append(files, File{
			Name:    e.Name,
			Size:    e.FileSize,
			ModTime: e.ModTime.ToTime().UTC(),
			Mode:    uint32(e.Permissions),
			Object:  e.ObjectID,
			Dir:     e.Type == snapshot.EntryTypeDirectory,
		})
	}
	return files, nil
}

// ReadFile returns a small file of a snapshot, at most limit bytes.
func (r *Repository) ReadFile(ctx context.Context, oid ObjectID, limit int64) ([]byte, error) {
	p, err := r.ReadObject(ctx, oid)
	if err != nil {
		return nil, err
	}
	if int64(len(p)) > limit {
		return nil, fmt.Errorf("object %v is %d bytes long, more than %d", oid, len(p), limit)
	}
	return p, nil
}

// WriteFile stores a small file of a snapshot (at most MaxContentSize bytes) among the
// repository's metadata, not its data: the loss of a pack of blocks must not lose the
// records of points.
func (w *Writer) WriteFile(ctx context.Context, p []byte) (ObjectID, error) {
	return w.WriteIndex(ctx, p)
}

// Record is a small JSON document of Varve's own beside the snapshots: a
// lease, a verify result, the note of a quarantine. Kopia keeps manifests of
// any type and never collects them.
type Record struct {
	ID      string
	Written time.Time
	Labels  map[string]string
}

// recordType is the manifest type of Varve's records; the label "varve" holds their kind.
const recordType = "varve"

// PutRecord stores a record of a kind under labels. Nothing is visible before
// Flush.
func (w *Writer) PutRecord(_ context.Context, kind string, labels map[string]string, payload any) (string, error) {
	all := map[string]string{manifest.TypeLabelKey: recordType, "varve": kind}
	maps.Copy(all, labels)
	id, err := w.w.PutManifest(w.ctx, all, payload)
	if err != nil {
		return "", fmt.Errorf("write %s record: %w", kind, explainWrite(err))
	}
	return string(id), nil
}

// DeleteRecord removes a record.
func (w *Writer) DeleteRecord(_ context.Context, id string) error { return w.deleteManifest(id) }

// ListRecords lists the records of a kind whose labels include those given.
func (r *Repository) ListRecords(ctx context.Context, kind string, labels map[string]string) ([]Record, error) {
	all := map[string]string{manifest.TypeLabelKey: recordType, "varve": kind}
	maps.Copy(all, labels)
	found, err := r.findManifests(ctx, all)
	if err != nil {
		return nil, fmt.Errorf("list %s records: %w", kind, err)
	}
	out := make([]Record, 0, len(found))
	for _, e := range found {
		out = append(out, Record{ID: string(e.ID), Written: e.ModTime, Labels: e.Labels})
	}
	return out, nil
}

// LoadRecord reads a record into payload. ok is false if it was deleted.
func (r *Repository) LoadRecord(ctx context.Context, id string, payload any) (ok bool, err error) {
	err = r.refreshing(ctx, func() error {
		_, err := r.rep.GetManifest(ctx, manifest.ID(id), payload)
		return err
	})
	if errors.Is(err, manifest.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read record %s: %w", id, err)
	}
	return true, nil
}

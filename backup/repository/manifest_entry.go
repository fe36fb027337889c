package repository

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/snapshot"
)

// manifestEntry is one manifest as Kopia stores it (kopia
// repo/manifest/serialized.go). A deleted one is an entry without data that is
// newer than the one it deletes.
type manifestEntry struct {
	ID      manifest.ID       `json:"id"`
	Labels  map[string]string `json:"labels"`
	ModTime time.Time         `json:"modified"`
	Deleted bool              `json:"deleted,omitempty"`
	Content json.RawMessage   `json:"data"`
}

func (e *manifestEntry) metadata() *manifest.EntryMetadata {
	labels := make(map[string]string, len(e.Labels))
	for k, v := range e.Labels {
		labels[k] = v
	}
	return &manifest.EntryMetadata{ID: e.ID, Length: len(e.Content), Labels: labels, ModTime: e.ModTime}
}

// passing reports whether an entry is used only while some process runs: the incomplete
// snapshot of a backup, or the lease of a reader.
func (e *manifestEntry) passing() bool {
	if e.Labels["varve"] == "lease" {
		return true
	}
	var s struct {
		Incomplete string `json:"incomplete"`
	}
	return e.Labels[manifest.TypeLabelKey] == snapshot.ManifestType && json.Unmarshal(e.Content, &s) == nil && s.Incomplete != ""
}

// tags returns the tags of a snapshot, and nil for another manifest.
func (e *manifestEntry) tags() map[string]string {
	if e.Labels[manifest.TypeLabelKey] != snapshot.ManifestType {
		return nil
	}
	tags := map[string]string{}
	for k, v := range e.Labels {
		if name, ok := strings.CutPrefix(k, tagPrefix); ok {
			tags[name] = v
		}
	}
	return tags
}

func (e *manifestEntry) has(labels map[string]string) bool {
	for k, v := range labels {
		if got, ok := e.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// manifestFile is what a manifest content holds, compressed by gzip.
type manifestFile struct {
	Entries []*manifestEntry `json:"entries"`
}

// maxManifestBytes bounds a decompressed manifest content. Kopia merges all manifests of
// a repository into one, so a hundred thousand recovery points must fit.
const maxManifestBytes = 512 << 20

// errBadManifest means that a manifest content decoded to something else.
var errBadManifest = errors.New("malformed manifests")

// decodeManifests decodes a manifest content.
func decodeManifests(p []byte) ([]*manifestEntry, error) {
	z, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadManifest, err)
	}
	defer z.Close()
	limited := &io.LimitedReader{R: z, N: maxManifestBytes}
	var f manifestFile
	if err := json.NewDecoder(limited).Decode(&f); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadManifest, err)
	}
	for _, e := range f.Entries {
		if e == nil || e.ID == "" {
			return nil, fmt.Errorf("%w: an entry without ID", errBadManifest)
		}
	}
	return f.Entries, nil
}

// encodeManifests is the reverse of decodeManifests.
func encodeManifests(entries []*manifestEntry) ([]byte, error) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	err := json.NewEncoder(z).Encode(manifestFile{Entries: entries})
	if err := errors.Join(err, z.Close()); err != nil {
		return nil, fmt.Errorf("encode manifests: %w", err)
	}
	return b.Bytes(), nil
}

package repository

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
)

// manifestRepository is a Kopia repository whose manifests are read by a manifestReader.
// Kopia's packages that get one (snapshots, policies, maintenance) read and write
// manifests through it.
type manifestRepository struct {
	repo.DirectRepository
	reader *manifestReader
}

func newManifestRepository(r repo.DirectRepository, log *slog.Logger) (*manifestRepository, error) {
	src, ok := r.ContentReader().(manifestSource)
	if !ok {
		return nil, fmt.Errorf("read manifests: Kopia's content reader is a %T without revisions", r.ContentReader())
	}
	return &manifestRepository{r, &manifestReader{src: src, refresh: r.Refresh, cache: &manifestCache{log: log}}}, nil
}

// FindManifests is repo.Repository.
func (r *manifestRepository) FindManifests(ctx context.Context, labels map[string]string) ([]*manifest.EntryMetadata, error) {
	v, err := r.reader.view(ctx)
	if err != nil {
		return nil, fmt.Errorf("read manifests: %w", err)
	}
	return v.find(labels, nil), nil
}

// GetManifest is repo.Repository.
func (r *manifestRepository) GetManifest(ctx context.Context, id manifest.ID, data any) (*manifest.EntryMetadata, error) {
	v, err := r.reader.view(ctx)
	if err != nil {
		return nil, fmt.Errorf("read manifests: %w", err)
	}
	return v.entries[id].get(id, data)
}

// NewWriter is repo.Repository.
func (r *manifestRepository) NewWriter(ctx context.Context, opt repo.WriteSessionOptions) (context.Context, repo.RepositoryWriter, error) {
	return r.NewDirectWriter(ctx, opt)
}

// NewDirectWriter is repo.DirectRepository.
func (r *manifestRepository) NewDirectWriter(ctx context.Context, opt repo.WriteSessionOptions) (context.Context, repo.DirectRepositoryWriter, error) {
	wctx, w, err := r.DirectRepository.NewDirectWriter(ctx, opt)
	if err != nil {
		return nil, nil, err
	}
	return wctx, &manifestSession{
		DirectRepositoryWriter: w,
		reader:                 &manifestReader{src: w.ContentManager(), refresh: w.Refresh, cache: r.reader.cache},
		pending:                map[manifest.ID]*manifestEntry{},
	}, nil
}

// get decodes a manifest; e is nil for a missing one.
func (e *manifestEntry) get(id manifest.ID, data any) (*manifest.EntryMetadata, error) {
	if e == nil || e.Deleted {
		return nil, fmt.Errorf("manifest %v: %w", id, manifest.ErrNotFound)
	}
	if data != nil {
		if err := json.Unmarshal(e.Content, data); err != nil {
			return nil, fmt.Errorf("manifest %v: %w", id, err)
		}
	}
	return e.metadata(), nil
}

// find returns the manifests with some labels, oldest first; those pending in a
// session go before those of the view.
func (v *manifestView) find(labels map[string]string, pending map[manifest.ID]*manifestEntry) []*manifest.EntryMetadata {
	var out []*manifest.EntryMetadata
	add := func(e *manifestEntry) {
		if !e.Deleted && e.has(labels) {
			out = append(out, e.metadata())
		}
	}
	for _, e := range pending {
		add(e)
	}
	for id, e := range v.entries {
		if pending[id] == nil {
			add(e)
		}
	}
	slices.SortFunc(out, func(a, b *manifest.EntryMetadata) int { return a.ModTime.Compare(b.ModTime) })
	return out
}

// manifestSession is a write session of a manifestRepository. Safe for concurrent use.
type manifestSession struct {
	repo.DirectRepositoryWriter
	reader *manifestReader

	mu      sync.Mutex
	pending map[manifest.ID]*manifestEntry // not flushed
}

// FindManifests is repo.Repository; it sees what is pending.
func (s *manifestSession) FindManifests(ctx context.Context, labels map[string]string) ([]*manifest.EntryMetadata, error) {
	v, err := s.reader.view(ctx)
	if err != nil {
		return nil, fmt.Errorf("read manifests: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return v.find(labels, s.pending), nil
}

// GetManifest is repo.Repository; it sees what is pending.
func (s *manifestSession) GetManifest(ctx context.Context, id manifest.ID, data any) (*manifest.EntryMetadata, error) {
	s.mu.Lock()
	e := s.pending[id]
	s.mu.Unlock()
	if e == nil {
		v, err := s.reader.view(ctx)
		if err != nil {
			return nil, fmt.Errorf("read manifests: %w", err)
		}
		e = v.entries[id]
	}
	return e.get(id, data)
}

// PutManifest is repo.RepositoryWriter. Nothing is read.
func (s *manifestSession) PutManifest(_ context.Context, labels map[string]string, payload any) (manifest.ID, error) {
	if labels[manifest.TypeLabelKey] == "" {
		return "", errors.New("a manifest needs a type")
	}
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return "", fmt.Errorf("manifest ID: %w", err)
	}
	data, err := json.Marshal(payload)
	if err != nil {
		return "", fmt.Errorf("encode manifest: %w", err)
	}
	e := &manifestEntry{ID: manifest.ID(hex.EncodeToString(id[:])), ModTime: s.Time().UTC(), Labels: map[string]string{}, Content: data}
	for k, v := range labels {
		e.Labels[k] = v
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending[e.ID] = e
	return e.ID, nil
}

// DeleteManifest is repo.RepositoryWriter. A missing one is no error.
func (s *manifestSession) DeleteManifest(ctx context.Context, id manifest.ID) error {
	v, err := s.reader.view(ctx)
	if err != nil {
		return fmt.Errorf("read manifests: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := v.entries[id]
	if p := s.pending[id]; p != nil {
		old = p
	}
	if old == nil || old.Deleted {
		return nil
	}
	at := s.Time().UTC()
	if !at.After(old.ModTime) { // written by a host whose clock is ahead
		at = old.ModTime.Add(time.Millisecond)
	}
	s.pending[id] = &manifestEntry{ID: id, ModTime: at, Deleted: true}
	return nil
}

// ReplaceManifests is repo.RepositoryWriter.
func (s *manifestSession) ReplaceManifests(ctx context.Context, labels map[string]string, payload any) (manifest.ID, error) {
	old, err := s.FindManifests(ctx, labels)
	if err != nil {
		return "", err
	}
	for _, e := range old {
		if err := s.DeleteManifest(ctx, e.ID); err != nil {
			return "", err
		}
	}
	return s.PutManifest(ctx, labels, payload)
}

// NewWriter is repo.Repository; sessions do not nest.
func (s *manifestSession) NewWriter(context.Context, repo.WriteSessionOptions) (context.Context, repo.RepositoryWriter, error) {
	return nil, nil, errors.New("a write session inside a write session")
}

// NewDirectWriter is repo.DirectRepository; sessions do not nest.
func (s *manifestSession) NewDirectWriter(context.Context, repo.WriteSessionOptions) (context.Context, repo.DirectRepositoryWriter, error) {
	return nil, nil, errors.New("a write session inside a write session")
}

// Flush is repo.RepositoryWriter.
func (s *manifestSession) Flush(ctx context.Context) error {
	if err := s.writePending(ctx); err != nil {
		return fmt.Errorf("write manifests: %w", err)
	}
	return s.DirectRepositoryWriter.Flush(ctx)
}

const (
	// mergeManifests is how many manifest contents there may be before they are
	// merged, as in Kopia. Only sessions that write manifests merge.
	mergeManifests = 16
	// manifestChunk is how many bytes of manifests go into one content, so that losing
	// one does not lose all.
	manifestChunk = 1 << 20
	// deletedAge is how long the deletion of a manifest is kept when contents are
	// merged. Another session that merges an older view would bring the manifest
	// back otherwise.
	deletedAge = 24 * time.Hour
)

// writePending turns pending manifests into a content, which the flush of the session
// makes visible.
func (s *manifestSession) writePending(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pending) == 0 {
		return nil
	}
	var entries []*manifestEntry
	for _, e := range s.pending {
		entries = append(entries, e)
	}
	v, err := s.reader.view(ctx)
	if err != nil {
		return err
	}
	// With many manifests there are several merged contents, and merging pays less often.
	if len(v.contents) < mergeManifests+int(2*v.bytes/manifestChunk) {
		_, err = s.writeEntries(ctx, entries)
	} else {
		err = s.merge(ctx, v, entries)
	}
	if err != nil {
		return err
	}
	s.pending = map[manifest.ID]*manifestEntry{}
	return nil
}

// merge writes all manifests that can be read, and new ones, into few contents and
// deletes the others. Contents that cannot be read stay: they may be restored. Written
// and deleted become visible in one index blob.
func (s *manifestSession) merge(ctx context.Context, v *manifestView, fresh []*manifestEntry) error {
	cm := s.ContentManager()
	cm.DisableIndexFlush(ctx)
	defer cm.EnableIndexFlush(ctx)
	entries := fresh
	limit := s.Time().Add(-deletedAge)
	for id, e := range v.entries {
		// While manifests are unreadable, a deletion may be of one of those.
		if s.pending[id] != nil || e.Deleted && e.ModTime.Before(limit) && len(v.unreadable) == 0 {
			continue
		}
		entries = append(entries, e)
	}
	written, err := s.writeEntries(ctx, entries)
	if err != nil {
		return err
	}
	for id := range v.contents {
		if written[id] {
			continue
		}
		if err := cm.DeleteContent(ctx, id); err != nil && !errors.Is(err, content.ErrContentNotFound) {
			return fmt.Errorf("delete merged manifests %v: %w", id, err)
		}
	}
	return nil
}

func (s *manifestSession) writeEntries(ctx context.Context, entries []*manifestEntry) (map[content.ID]bool, error) {
	slices.SortFunc(entries, func(a, b *manifestEntry) int { return a.ModTime.Compare(b.ModTime) })
	written := map[content.ID]bool{}
	for len(entries) > 0 {
		n, size := 0, 0
		for n < len(entries) && (n == 0 || size < manifestChunk) {
			size += len(entries[n].Content)
			n++
		}
		p, err := encodeManifests(entries[:n])
		if err != nil {
			return nil, err
		}
		cid, err := s.writeContent(ctx, p)
		if err != nil {
			return nil, err
		}
		written[cid] = true
		entries = entries[n:]
	}
	return written, nil
}

func (s *manifestSession) writeContent(ctx context.Context, p []byte) (content.ID, error) {
	opt := object.WriterOptions{Description: "manifests", Prefix: manifest.ContentPrefix, Splitter: "FIXED-8M"}
	if s.ContentReader().SupportsContentCompression() {
		opt.Compressor = indexCompression
	}
	ow := s.NewObjectWriter(ctx, opt)
	defer ow.Close()
	if _, err := ow.Write(p); err != nil {
		return content.ID{}, fmt.Errorf("write manifests: %w", err)
	}
	oid, err := ow.Result()
	if err != nil {
		return content.ID{}, fmt.Errorf("write manifests: %w", err)
	}
	cid, compressed, ok := oid.ContentID()
	if !ok || compressed || cid.Prefix() != manifest.ContentPrefix {
		return content.ID{}, fmt.Errorf("manifests of %d bytes do not fit one content", len(p))
	}
	return cid, nil
}

package repository

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/index"
	"github.com/kopia/kopia/repo/manifest"
	"golang.org/x/sync/errgroup"
)

// UnreadableManifests is an unreadable content of manifests (recovery points, and records
// about them). What it held is not known.
type UnreadableManifests struct {
	Content string `json:"content"`
	Pack    string `json:"pack"` // blob that holds it, or held it
	Err     error  `json:"-"`
	Reason  string `json:"reason"`

	id content.ID
}

// manifestView is the manifests of a repository at one moment. Immutable.
type manifestView struct {
	entries    map[manifest.ID]*manifestEntry // the newest of each, deleted ones included
	contents   map[content.ID]bool            // that were read
	bytes      int64                          // of the manifests in them
	unreadable []UnreadableManifests          // by content
}

// manifestSource is what manifests are read from: Kopia's content manager, of the
// repository or of a write session, which also sees its own writes.
type manifestSource interface {
	content.Reader
	// Revision changes with every change of the index.
	Revision() int64
}

// manifestCache remembers decoded manifest contents, which never change, so that a new
// view reads only what is new in it. Safe for concurrent use.
type manifestCache struct {
	log    *slog.Logger
	mu     sync.Mutex
	byID   map[content.ID][]*manifestEntry
	warned map[content.ID]bool // of contents that cannot be read
}

// warn logs each unreadable content once.
func (c *manifestCache) warn(ctx context.Context, id content.ID, u UnreadableManifests) {
	c.mu.Lock()
	known := c.warned[id]
	if c.warned == nil {
		c.warned = map[content.ID]bool{}
	}
	c.warned[id] = true
	c.mu.Unlock()
	if !known {
		c.log.WarnContext(ctx, "part of the list of recovery points cannot be read: points may be missing from it",
			"pack", u.Pack, "content", u.Content, "error", u.Reason, "next", "put the pack back from a copy of the storage, or run 'varve repo repair'")
	}
}

func (c *manifestCache) get(id content.ID) ([]*manifestEntry, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.byID[id]
	return e, ok
}

func (c *manifestCache) put(id content.ID, entries []*manifestEntry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byID == nil {
		c.byID = map[content.ID][]*manifestEntry{}
	}
	c.byID[id] = entries
}

// keep drops contents that a view does not have: merging replaces many by few.
func (c *manifestCache) keep(contents map[content.ID]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.byID, func(id content.ID, _ []*manifestEntry) bool { return !contents[id] })
}

// manifestReader reads manifests one content at a time. Kopia reads all of them
// or none (kopia repo/manifest/committed_manifest_manager.go), so that one damaged pack
// of 4 KB hides every recovery point; here unreadable contents are left out and named.
// Failing storage is still an error: a recovery point that is unreachable for a moment
// must not count as deleted. Safe for concurrent use.
type manifestReader struct {
	src     manifestSource
	refresh func(context.Context) error
	cache   *manifestCache

	skip map[content.ID]bool // contents to leave out; nil for none

	mu       sync.Mutex
	revision int64
	current  *manifestView
}

// reset makes the next view read the index again, even at the same revision.
func (m *manifestReader) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.current = nil
}

// view returns the manifests as the index has them now.
func (m *manifestReader) view(ctx context.Context) (*manifestView, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if rev := m.src.Revision(); m.current != nil && m.revision == rev {
		return m.current, nil
	}
	rev := m.src.Revision()
	v, missing, err := m.load(ctx)
	if err == nil && missing {
		// Another process may have merged them into a content that the index does not have yet.
		if err = m.refresh(ctx); err == nil {
			rev = m.src.Revision()
			v, _, err = m.load(ctx)
		}
	}
	if err != nil {
		return nil, err
	}
	for _, u := range v.unreadable {
		m.cache.warn(ctx, u.id, u)
	}
	m.revision, m.current = rev, v
	m.cache.keep(v.contents)
	return v, nil
}

// manifestReads is how many contents are read at once.
const manifestReads = 8

// load reads all manifest contents. missing is set when the index knows one
// whose bytes are not there.
func (m *manifestReader) load(ctx context.Context) (v *manifestView, missing bool, err error) {
	infos := map[content.ID]content.Info{}
	if err := m.src.IterateContents(ctx, content.IterateOptions{Range: index.PrefixRange(manifest.ContentPrefix)}, func(ci content.Info) error {
		if !m.skip[ci.ContentID] {
			infos[ci.ContentID] = ci
		}
		return nil
	}); err != nil {
		return nil, false, err
	}
	v = &manifestView{entries: map[manifest.ID]*manifestEntry{}, contents: map[content.ID]bool{}}
	var mu sync.Mutex // guards v and missing
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(manifestReads)
	for id, ci := range infos {
		if entries, ok := m.cache.get(id); ok {
			mu.Lock()
			v.add(id, entries)
			mu.Unlock()
			continue
		}
		g.Go(func() error {
			entries, err := m.read(gctx, id)
			if err != nil && !isMissing(err) && !isCorrupt(err) && !errors.Is(err, errBadManifest) {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				missing = missing || isMissing(err)
				v.unreadable = append(v.unreadable, UnreadableManifests{
					Content: id.String(), Pack: string(ci.PackBlobID), Err: wrapManifest(err), Reason: brief(err), id: id,
				})
				return nil
			}
			v.add(id, entries)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, false, err
	}
	slices.SortFunc(v.unreadable, func(a, b UnreadableManifests) int { return strings.Compare(a.Content, b.Content) })
	return v, missing, nil
}

func (m *manifestReader) read(ctx context.Context, id content.ID) ([]*manifestEntry, error) {
	p, err := m.src.GetContent(ctx, id)
	if err != nil {
		return nil, err
	}
	entries, err := decodeManifests(p)
	if err == nil {
		m.cache.put(id, entries)
	}
	return entries, err
}

func wrapManifest(err error) error {
	if isMissing(err) {
		return errors.Join(ErrContentMissing, err)
	}
	return errors.Join(ErrContentCorrupt, err)
}

func (v *manifestView) add(id content.ID, entries []*manifestEntry) {
	v.contents[id] = true
	for _, e := range entries {
		v.bytes += int64(len(e.Content))
		if old := v.entries[e.ID]; old == nil || e.ModTime.After(old.ModTime) {
			v.entries[e.ID] = e
		}
	}
}

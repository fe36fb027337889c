package repository

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/index"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/manifest"
)

// near answers locally what need not come from a storage. When a repository is opened, it
// requests at once what Kopia requests one after the other. A nil near does nothing.
type near struct {
	lists  *indexLists
	recent *recentBlobs // nil for local storages, and if the user limits reads
	cached func(blob.ID) bool
	far    bool        // the storage is not on this machine
	piles  bool        // it keeps each version of an overwritten blob
	silent atomic.Bool // it failed when it was last asked

	ctx    context.Context // of requests made ahead
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	storage blob.Storage
	blobcfg *earlyBlob // nil once it was read
}

// aheadTime bounds the wait for a blob that was requested ahead. After it, the storage is
// asked for what is needed.
const aheadTime = 10 * time.Second

// earlyBlob is a blob that was requested before Kopia needs it.
type earlyBlob struct {
	begun time.Time
	done  chan struct{}
	p     []byte
	err   error
}

// newNear returns the near of a connection.
func newNear(lc *repo.LocalConfig, now func() time.Time, opt OpenOptions) *near {
	kind := unguarded(*lc.Storage)
	n := &near{lists: &indexLists{now: now}, far: !isLocal(kind), piles: kind.Type == "b2"}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	if readsRuns(lc) && !opt.FromStorage {
		n.recent = newRecentBlobs()
		if opt.badCopies {
			n.recent.without()
		}
		n.cached = cachedIndexes(cacheDir(lc))
	}
	return n
}

// cachedIndexes reports for an index blob whether Kopia's cache on this machine has it (kopia
// repo/content/committed_content_index_disk_cache.go).
func cachedIndexes(dir string) func(blob.ID) bool {
	return func(id blob.ID) bool {
		if dir == "" {
			return false
		}
		_, err := os.Stat(filepath.Join(dir, "indexes", string(id)+".sndx"))
		return err == nil
	}
}

type nearKey struct{}

func withNear(ctx context.Context, n *near) context.Context {
	return context.WithValue(ctx, nearKey{}, n)
}

func nearOf(ctx context.Context) *near {
	n, _ := ctx.Value(nearKey{}).(*near)
	return n
}

// opened sets the storage, and requests what opening the repository will need. ctx is the
// storage's.
func (n *near) opened(ctx context.Context, st blob.Storage) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.storage = st
	if n.recent == nil {
		return
	}
	n.recent.fetch = func(ctx context.Context) ([]byte, error) {
		out := &boundedBuffer{most: maxRecentBytes}
		err := st.GetBlob(ctx, recentID, 0, -1, out)
		return out.p, err
	}
	// Values of ctx are the storage's; only readers that need these blobs wait for them.
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	context.AfterFunc(n.ctx, stop)
	list := n.lists.begin(ctx, st.ListBlobs)
	n.wg.Go(func() {
		if n.recent.lacks(list(), n.cached) {
			n.recent.load(ctx)
		}
	})
	early := &earlyBlob{begun: time.Now(), done: make(chan struct{})}
	n.blobcfg = early
	n.wg.Go(func() {
		defer close(early.done)
		ctx, cancel := context.WithTimeout(ctx, aheadTime)
		defer cancel()
		out := &boundedBuffer{most: maxRecentBlob}
		early.err = st.GetBlob(ctx, format.KopiaBlobCfgBlobID, 0, -1, out)
		early.p = out.p
	})
}

// boundedBuffer is a blob.OutputBuffer that takes no more than most bytes.
type boundedBuffer struct {
	p    []byte
	most int
}

var errLong = errors.New("the blob is longer than expected")

func (b *boundedBuffer) Write(p []byte) (int, error) {
	if len(b.p)+len(p) > b.most {
		return 0, errLong
	}
	b.p = append(b.p, p...)
	return len(p), nil
}

func (b *boundedBuffer) Reset()      { b.p = b.p[:0] }
func (b *boundedBuffer) Length() int { return len(b.p) }

// read returns bytes of a blob; ok is false if the storage must be asked.
func (n *near) read(ctx context.Context, id blob.ID, offset, length int64) (p []byte, ok bool, err error) {
	if n == nil {
		return nil, false, nil
	}
	if id != format.KopiaBlobCfgBlobID {
		p, ok = n.recent.read(ctx, id, offset, length)
		return p, ok, nil
	}
	n.mu.Lock()
	early := n.blobcfg
	n.blobcfg = nil
	n.mu.Unlock()
	if early == nil || offset != 0 || length >= 0 || time.Since(early.begun) > listLife {
		return nil, false, nil
	}
	select {
	case <-early.done:
	case <-ctx.Done():
		return nil, false, nil
	}
	// Kopia retries and reports a failure.
	if early.err != nil && !errors.Is(early.err, blob.ErrBlobNotFound) {
		return nil, false, nil
	}
	return early.p, true, early.err
}

// keepRead reads a blob by get, and holds its bytes if they are few.
func (n *near) keepRead(id blob.ID, offset, length int64, out blob.OutputBuffer, get func(blob.OutputBuffer) error) error {
	if n == nil || n.recent == nil || offset != 0 || length >= 0 || !isRecentKind(id) {
		return get(out)
	}
	both := &copyingBuffer{OutputBuffer: out}
	err := get(both)
	if err == nil && !both.over {
		n.recent.keep(id, both.p, false)
	}
	return err
}

// copyingBuffer keeps a copy of what is written, if it is small.
type copyingBuffer struct {
	blob.OutputBuffer
	p    []byte
	over bool
}

func (b *copyingBuffer) Write(p []byte) (int, error) {
	if b.over = b.over || len(b.p)+len(p) > maxRecentBlob; !b.over {
		b.p = append(b.p, p...)
	}
	return b.OutputBuffer.Write(p) //nolint:wrapcheck // the buffer's own
}

func (b *copyingBuffer) Reset() {
	b.p, b.over = nil, false
	b.OutputBuffer.Reset()
}

// reckons reports whether the write time of a blob may be computed: of session markers and
// index blobs, where asking takes a request.
func (n *near) reckons(id blob.ID) bool {
	return n != nil && n.far && (id[0] == content.BlobIDPrefixSession[0] || id[0] == indexPrefixAll[0])
}

// heard notes whether the storage answered.
func (n *near) heard(answered bool) {
	if n != nil {
		n.silent.Store(!answered)
	}
}

// list answers a list; ok is false if the storage must be asked.
func (n *near) list(ctx context.Context, prefix blob.ID, list lister, do func(blob.Metadata) error) (ok bool, err error) {
	if n == nil {
		return false, nil
	}
	return n.lists.list(ctx, prefix, list, do)
}

// changing is called before a blob is written or deleted.
func (n *near) changing(id blob.ID) {
	if n != nil {
		n.lists.changed(id)
	}
}

// wrote is called after a write.
func (n *near) wrote(id blob.ID, data blob.Bytes, err error) {
	if n == nil {
		return
	}
	n.lists.changed(id)
	if n.recent == nil || err != nil || data.Length() > maxRecentBlob || !isRecentKind(id) {
		return
	}
	out := &boundedBuffer{most: maxRecentBlob}
	if _, err := data.WriteTo(out); err == nil {
		n.recent.keep(id, out.p, true)
	}
}

// deleted is called after a deletion.
func (n *near) deleted(id blob.ID) {
	if n == nil {
		return
	}
	n.lists.changed(id)
	n.recent.forget(id)
}

// close ends running requests.
func (n *near) close() {
	if n == nil {
		return
	}
	n.cancel()
	n.wg.Wait()
}

// save writes copies of the small blobs that this process wrote or read, for later opens of
// the repository. packs are the packs that hold manifests.
func (n *near) save(ctx context.Context, packs map[blob.ID]bool, proven func(blob.ID, []byte) bool) error {
	n.recent.load(ctx) // what others copied stays
	names := n.lists.known()
	p := n.recent.encode(func(id blob.ID) bool { return names[id] || packs[id] }, proven)
	n.mu.Lock()
	st := n.storage
	n.mu.Unlock()
	return st.PutBlob(ctx, recentID, text(p), blob.PutOptions{})
}

// saveTime bounds how long the end of a process waits for the copies to be written.
const saveTime = 5 * time.Second

// saveRecent writes the copies if that is worthwhile. It is best effort.
func (r *Repository) saveRecent(ctx context.Context) {
	if r.near == nil || r.near.recent == nil || !r.Writable() || ctx.Err() != nil || r.Fatal() != nil || r.near.silent.Load() || r.near.piles || !r.near.recent.worthSaving() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, saveTime)
	defer cancel()
	// With locked objects each version would be kept as long as a pack.
	if cfg, err := r.direct.FormatManager().BlobCfgBlob(ctx); err != nil || cfg.IsRetentionEnabled() {
		return
	}
	packs := map[blob.ID]bool{}
	err := r.direct.ContentReader().IterateContents(ctx, content.IterateOptions{Range: index.PrefixRange(manifest.ContentPrefix)}, func(ci content.Info) error {
		packs[ci.PackBlobID] = true
		return nil
	})
	if err == nil {
		err = r.near.save(ctx, packs, r.provenIndex)
	}
	if err != nil {
		r.log.DebugContext(ctx, "cannot write copies of index blobs; opening the repository takes a request for each", "error", err)
	}
}

// provenIndex reports whether bytes are those of the index blob of a name: they decrypt under it, as
// in kopia internal/blobcrypto.
func (r *Repository) provenIndex(id blob.ID, p []byte) bool {
	return decrypts(r.direct.ContentReader().ContentFormat().Encryptor().Decrypt, id, p)
}

// decrypts calls decrypt, whose types are internal to Kopia.
func decrypts[In, Out any](decrypt func(In, []byte, *Out) error, id blob.ID, p []byte) bool {
	name, _, _ := strings.Cut(string(id), "-")
	iv, err := hex.DecodeString(name[max(0, len(name)-32):])
	set := setBytes[In]()
	out := new(Out)
	closer, ok := any(out).(interface{ Close() })
	if err != nil || len(iv) != 16 || set == nil || !ok {
		return false
	}
	defer closer.Close()
	return decrypt(set(p), iv, out) == nil
}

// ReadFromStorage makes later reads come from the storage, not from memory; for callers
// that look for damage.
func (r *Repository) ReadFromStorage() {
	if r.near != nil {
		r.near.recent.expire()
	}
}

// ReadBack has the packs of metadata that were written so far be read from the storage, should they
// be read, and not from memory: for those who make sure that what they wrote is there.
func (r *Repository) ReadBack() {
	if r.near != nil {
		r.near.recent.expireWritten()
	}
}

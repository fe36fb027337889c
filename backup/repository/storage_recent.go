package repository

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

const (
	// recentID is the blob that holds copies of small blobs (docs/format.md). Kopia
	// ignores blobs of such a name.
	recentID blob.ID = "varve.recent"
	// maxRecentBlob is the size of the largest blob that is copied: the index blob or the metadata
	// of an increment.
	maxRecentBlob = 64 << 10
	// maxRecent bounds the bytes copied, and those held in memory.
	maxRecent = 512 << 10
	// maxOthers bounds the copies of packs that opening a repository does not read: the
	// latest records and indexes of recovery points.
	maxOthers = 128 << 10
	// recentLife is how long a copy answers for its blob. After that the storage is asked, so
	// that a server's later reads come from there.
	recentLife = time.Minute
)

// recentBlobs holds small index blobs and packs of metadata in memory: those that this
// process wrote, and the copies in the storage, which one request reads. Neither kind ever
// changes, and Kopia authenticates the bytes under the blob's name, so they may come from here.
// This does not decide what exists: Kopia reads only what a list or the index names. Blobs that
// this process read are held to be copied only, and only if their names prove them: bytes that came
// damaged are not given out again, nor to others. Safe for concurrent use.
type recentBlobs struct {
	fetch func(context.Context) ([]byte, error) // of recentID

	mu      sync.Mutex
	blobs   map[blob.ID]recentBlob
	order   []blob.ID // as they came
	bytes   int
	loading chan struct{} // nil until the copies are read; closed afterwards
	copied  map[blob.ID]bool
	wrote   int // index blobs of this process
}

type recentBlob struct {
	p     []byte
	until time.Time // when it expires
	wrote bool      // by this process
	read  bool      // by this process, from the blob itself
}

func newRecentBlobs() *recentBlobs {
	return &recentBlobs{blobs: map[blob.ID]recentBlob{}, copied: map[blob.ID]bool{}}
}

// isRecentKind reports whether blobs of this kind are held: index blobs, and packs of
// metadata.
func isRecentKind(id blob.ID) bool {
	for _, prefix := range []string{"q", "xn", "xs", "xr"} {
		if strings.HasPrefix(string(id), prefix) {
			return true
		}
	}
	return false
}

// keep holds a blob that was written or read whole. The caller must not modify p later.
// A blob that was read is not given out.
func (r *recentBlobs) keep(id blob.ID, p []byte, written bool) {
	if r == nil || !isRecentKind(id) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if written && id[0] == 'x' {
		r.wrote++
	}
	b := recentBlob{p: p, wrote: written, read: !written}
	if written {
		b.until = time.Now().Add(recentLife)
	}
	r.keepLocked(id, b)
}

func (r *recentBlobs) keepLocked(id blob.ID, b recentBlob) {
	p := b.p
	if len(p) > maxRecentBlob {
		return
	}
	if _, held := r.blobs[id]; held {
		return
	}
	r.blobs[id] = b
	r.order = append(r.order, id)
	r.bytes += len(p)
	for r.bytes > 2*maxRecent {
		r.dropLocked(r.order[0])
	}
}

func (r *recentBlobs) dropLocked(id blob.ID) {
	b, held := r.blobs[id]
	if !held {
		return
	}
	delete(r.blobs, id)
	r.bytes -= len(b.p)
	r.order = slices.DeleteFunc(r.order, func(o blob.ID) bool { return o == id })
}

// forget drops a blob that was deleted.
func (r *recentBlobs) forget(id blob.ID) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropLocked(id)
}

// expire makes all later reads go to the storage.
func (r *recentBlobs) expire() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, b := range r.blobs {
		b.until = time.Time{}
		r.blobs[id] = b
	}
}

// expireWritten makes later reads ask the storage for the packs that this process wrote.
func (r *recentBlobs) expireWritten() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, b := range r.blobs {
		if b.wrote && id[0] == 'q' {
			b.until = time.Time{}
			r.blobs[id] = b
		}
	}
}

// doubt drops all that this process did not write itself. It reports whether there was any.
func (r *recentBlobs) doubt() (found bool) {
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, b := range r.blobs {
		if !b.wrote {
			found = true
			r.dropLocked(id)
		}
	}
	return found
}

// without leaves the copies in the storage unread.
func (r *recentBlobs) without() {
	r.loading = make(chan struct{})
	close(r.loading)
}

// read returns bytes of a blob, all from offset on for a negative length; ok is false if
// the storage must be asked. It waits for the copies if they are being read.
func (r *recentBlobs) read(ctx context.Context, id blob.ID, offset, length int64) (p []byte, ok bool) {
	if r == nil || !isRecentKind(id) || offset < 0 {
		return nil, false
	}
	r.mu.Lock()
	loading := r.loading
	r.mu.Unlock()
	if loading != nil {
		select {
		case <-loading:
		case <-ctx.Done():
			return nil, false
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	b, held := r.blobs[id]
	n := int64(len(b.p))
	if !held || !time.Now().Before(b.until) || offset > n {
		return nil, false
	}
	if length < 0 {
		length = n - offset
	}
	if length > n-offset {
		return nil, false // the storage reports the error
	}
	return b.p[offset : offset+length], true
}

// load reads the copies in the storage, once. It is best effort: without them each blob is
// read by itself.
func (r *recentBlobs) load(ctx context.Context) {
	r.mu.Lock()
	if r.loading != nil {
		loading := r.loading
		r.mu.Unlock()
		<-loading
		return
	}
	r.loading = make(chan struct{})
	r.mu.Unlock()
	defer close(r.loading)
	ctx, cancel := context.WithTimeout(ctx, aheadTime)
	defer cancel()
	p, err := r.fetch(ctx)
	if err != nil {
		return
	}
	all, err := decodeRecent(p)
	if err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	newer := r.order
	r.order = nil
	for _, b := range all {
		r.keepLocked(b.id, recentBlob{p: b.p, until: time.Now().Add(recentLife)})
		r.copied[b.id] = true
	}
	r.order = append(r.order, newer...)
}

// lacks reports whether reading the copies takes fewer requests than reading the missing
// blobs one by one. has reports whether Kopia's cache has one.
func (r *recentBlobs) lacks(blobs []blob.Metadata, has func(blob.ID) bool) bool {
	n := 0
	for _, m := range blobs {
		if isRecentKind(m.BlobID) && m.Length <= maxRecentBlob && !has(m.BlobID) {
			n++
		}
	}
	return n > 2
}

// worthSaving reports whether this process wrote index blobs, and enough have no copy that
// readers gain by new copies.
func (r *recentBlobs) worthSaving() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for id := range r.blobs {
		if id[0] == 'x' && !r.copied[id] {
			n++
		}
	}
	return r.wrote > 0 && n >= 2
}

// encode returns the bytes to write: the held blobs that opening the repository reads, and as
// many of the other packs as fit, in both cases the latest. proven reports whether the bytes
// of an index blob are those that its name says. A pack that was read is not copied: parts of it
// that were not decoded here may be damaged.
func (r *recentBlobs) encode(opening func(blob.ID) bool, proven func(blob.ID, []byte) bool) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, b := range r.blobs {
		if index := id[0] == indexPrefixAll[0]; !b.wrote && (index && !proven(id, b.p) || !index && b.read) {
			r.dropLocked(id)
		}
	}
	chosen := map[blob.ID]bool{}
	left := maxRecent
	choose := func(room int, want func(blob.ID) bool) {
		room = min(room, left)
		for _, id := range slices.Backward(r.order) {
			if n := len(r.blobs[id].p); n <= room && want(id) {
				chosen[id] = true
				room -= n
				left -= n
			}
		}
	}
	choose(left, opening)
	choose(maxOthers, func(id blob.ID) bool { return id[0] != indexPrefixAll[0] && !chosen[id] })
	var all []namedBlob
	for _, id := range r.order {
		if chosen[id] {
			all = append(all, namedBlob{id, r.blobs[id].p})
		}
	}
	return encodeRecent(all)
}

// namedBlob is a blob and its name.
type namedBlob struct {
	id blob.ID
	p  []byte
}

// recentMagic begins recentID.
const recentMagic = "varve recent 1\n"

// encodeRecent returns the bytes of recentID: the magic, for each blob its name and its bytes,
// each preceded by its length in 4 bytes (big endian), and the SHA-256 of all that.
func encodeRecent(all []namedBlob) []byte {
	out := []byte(recentMagic)
	for _, b := range all {
		out = binary.BigEndian.AppendUint32(out, uint32(len(b.id)))
		out = append(out, b.id...)
		out = binary.BigEndian.AppendUint32(out, uint32(len(b.p)))
		out = append(out, b.p...)
	}
	sum := sha256.Sum256(out)
	return append(out, sum[:]...)
}

var errBadRecent = errors.New("malformed copies of blobs")

// decodeRecent is the reverse of encodeRecent. The blobs share p.
func decodeRecent(p []byte) ([]namedBlob, error) {
	end := len(p) - sha256.Size
	if end < len(recentMagic) || len(p) > maxRecentBytes || string(p[:len(recentMagic)]) != recentMagic {
		return nil, errBadRecent
	}
	if sum := sha256.Sum256(p[:end]); !bytes.Equal(sum[:], p[end:]) {
		return nil, errBadRecent
	}
	var out []namedBlob
	rest := p[len(recentMagic):end:end]
	for len(rest) > 0 {
		id, after, ok := cutCounted(rest)
		if !ok {
			return nil, errBadRecent
		}
		data, after, ok := cutCounted(after)
		if !ok || len(data) > maxRecentBlob || !blobName.Match(id) || !isRecentKind(blob.ID(id)) {
			return nil, errBadRecent
		}
		out = append(out, namedBlob{blob.ID(id), data})
		rest = after
	}
	return out, nil
}

// maxRecentBytes bounds recentID when it is read: twice what is written, names included.
const maxRecentBytes = 2 * maxRecent

// cutCounted cuts off bytes that are preceded by their length.
func cutCounted(p []byte) (head, rest []byte, ok bool) {
	if len(p) < 4 {
		return nil, nil, false
	}
	n := int64(binary.BigEndian.Uint32(p))
	if n > int64(len(p)-4) {
		return nil, nil, false
	}
	return p[4 : 4+n : 4+n], p[4+n:], true
}

package repository

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
)

const (
	// maxRun is the most bytes that one request fetches of a pack, which has a little
	// over 20 MiB: four requests.
	maxRun = 6 << 20
	// maxGap is how many bytes between two contents are fetched and discarded rather than
	// skipped by a second request: what a link of 100 MB/s carries in the 5 ms of a near
	// request.
	maxGap = 512 << 10
	// maxHeld bounds the bytes fetched and being fetched, of one repository.
	maxHeld = 48 << 20
	// maxRequests bounds the running requests that no reader waits for yet.
	maxRequests = 16
	// maxPlanned bounds the known runs, fetched or not.
	maxPlanned = 4096
	// maxGiven is how many contents are remembered as read: they are on their way to a
	// cache, and announcing them again would fetch them again.
	maxGiven = 1024
	// idleRuns is how long fetched bytes are kept without a read.
	idleRuns = 30 * time.Second
	// runTimeout bounds one fetch; after it, waiting readers read from storage themselves.
	runTimeout = time.Minute
)

// packRuns fetches adjacent contents of a pack with one request, and several such runs at
// once, for storages where each request crosses a network. Reads are announced
// ([Repository.ReadSoon]). Nothing is fetched before the first content of a run is
// requested, which Kopia does only if its own cache lacks it. Then the runs after it are
// fetched too, within bounds. Packs never change, and Kopia authenticates each content,
// so the bytes may come from here as well as from storage. Each content is returned once
// per announcement: a content that is read again, because its bytes were damaged on the
// way, comes from storage.
type packRuns struct {
	ctx    context.Context // of the fetches, which outlive the reads that start them
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	fetch   func(ctx context.Context, id blob.ID, offset, length int64) ([]byte, error) // set by the storage
	packs   map[blob.ID][]*packRun                                                      // by offset
	order   []*packRun                                                                  // as announced
	held    int64
	flying  int
	idle    *time.Timer
	stopped bool

	given    map[contentPlace]bool
	giveNext []contentPlace // in the order in which they are forgotten
}

// contentPlace is where a content begins.
type contentPlace struct {
	pack blob.ID
	off  int64
}

// packRun is a range of a pack with contents that will be read.
type packRun struct {
	pack     blob.ID
	off, end int64
	wants    map[int64]bool // offsets of the contents announced and not read yet
	ready    chan struct{}  // nil until the fetch begins; closed when it ends
	cancel   context.CancelFunc
	data     []byte // nil if fetching failed
	gone     bool   // forgotten: its bytes are no longer counted
}

func newPackRuns() *packRuns {
	ctx, cancel := context.WithCancel(context.Background())
	return &packRuns{ctx: ctx, cancel: cancel, packs: map[blob.ID][]*packRun{}, given: map[contentPlace]bool{}}
}

type runsKey struct{}

// withRuns makes the storage that is opened with the context read by runs; nil for not.
func withRuns(ctx context.Context, r *packRuns) context.Context {
	return context.WithValue(ctx, runsKey{}, r)
}

func runsOf(ctx context.Context) *packRuns {
	r, _ := ctx.Value(runsKey{}).(*packRuns)
	return r
}

// use sets the storage to fetch from.
func (r *packRuns) use(st blob.Storage) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fetch = func(ctx context.Context, id blob.ID, offset, length int64) ([]byte, error) {
		out := &runBuffer{p: make([]byte, 0, length)}
		if err := st.GetBlob(ctx, id, offset, length, out); err != nil {
			return nil, err //nolint:wrapcheck // read again, by one that reports it
		}
		return out.p, nil
	}
}

// runBuffer is a blob.OutputBuffer.
type runBuffer struct{ p []byte }

func (b *runBuffer) Write(p []byte) (int, error) { b.p = append(b.p, p...); return len(p), nil }
func (b *runBuffer) Reset()                      { b.p = b.p[:0] }
func (b *runBuffer) Length() int                 { return len(b.p) }

// ReadSoon announces objects that will be read, in about this order. It is a hint, and
// returns at once. It returns false if it does nothing: for local storages, and through a
// Kopia API server.
func (r *Repository) ReadSoon(ctx context.Context, oids []ObjectID) bool {
	if r.runs == nil || r.direct == nil {
		return false
	}
	parts := make([]packPart, 0, len(oids))
	for _, oid := range oids {
		cid, _, ok := contentOf(oid)
		if !ok {
			continue
		}
		info, err := r.direct.ContentReader().ContentInfo(ctx, cid)
		if err != nil || info.PackBlobID == "" || info.PackBlobID[0] != content.PackBlobIDPrefixRegular[0] {
			continue // Kopia reads packs of metadata whole
		}
		off := int64(info.PackOffset)
		parts = append(parts, packPart{info.PackBlobID, off, off + int64(info.PackedLength), len(parts)})
	}
	r.runs.announce(parts)
	return true
}

// packPart is the place of a content.
type packPart struct {
	pack     blob.ID
	off, end int64
	turn     int // its place in the order of reading
}

// announce joins parts to runs, in the order in which the first of each is read.
func (r *packRuns) announce(parts []packPart) {
	r.mu.Lock()
	parts = slices.DeleteFunc(parts, func(p packPart) bool {
		if r.given[contentPlace{p.pack, p.off}] {
			return true
		}
		at := r.findLocked(p.pack, p.off, p.end) // announced before, or read through
		if at != nil {
			at.wants[p.off] = true
		}
		return at != nil
	})
	r.mu.Unlock()
	slices.SortFunc(parts, func(a, b packPart) int {
		return cmp.Or(cmp.Compare(a.pack, b.pack), cmp.Compare(a.off, b.off))
	})
	type planned struct {
		run  *packRun
		turn int
	}
	var runs []planned
	for _, p := range parts {
		if p.end-p.off > maxRun || p.end <= p.off {
			continue
		}
		if n := len(runs) - 1; n >= 0 {
			last := runs[n].run
			if last.pack == p.pack && p.off-last.end <= maxGap && max(p.end, last.end)-last.off <= maxRun {
				last.end, last.wants[p.off] = max(last.end, p.end), true
				runs[n].turn = min(runs[n].turn, p.turn)
				continue
			}
		}
		runs = append(runs, planned{&packRun{pack: p.pack, off: p.off, end: p.end, wants: map[int64]bool{p.off: true}}, p.turn})
	}
	slices.SortFunc(runs, func(a, b planned) int { return cmp.Compare(a.turn, b.turn) })
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return
	}
	for _, p := range runs {
		if len(r.order) >= maxPlanned {
			r.dropLocked(r.order[0])
		}
		r.packs[p.run.pack] = append(r.packs[p.run.pack], p.run)
		r.order = append(r.order, p.run)
	}
	r.touchLocked()
}

// findLocked returns the run that covers a range of a pack.
func (r *packRuns) findLocked(id blob.ID, off, end int64) *packRun {
	for _, run := range r.packs[id] {
		if run.off <= off && end <= run.end {
			return run
		}
	}
	return nil
}

// read returns the bytes of a range that lies in a run, or false if they must be read
// from storage. The result is shared and must not be modified.
func (r *packRuns) read(ctx context.Context, id blob.ID, off, length int64) ([]byte, bool) {
	if r == nil || length <= 0 {
		return nil, false
	}
	r.mu.Lock()
	run := r.findLocked(id, off, off+length)
	if run == nil || !run.wants[off] {
		r.mu.Unlock()
		return nil, false
	}
	r.touchLocked()
	if run.ready == nil && !r.beginLocked(run, true) {
		r.dropLocked(run)
		r.mu.Unlock()
		return nil, false
	}
	r.aheadLocked(run)
	r.mu.Unlock()

	select {
	case <-run.ready:
	case <-ctx.Done():
		// The storage may be gone, on a connection that the system still considers alive:
		// nothing else must wait for this fetch.
		r.mu.Lock()
		r.dropLocked(run)
		r.mu.Unlock()
		return nil, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	data := run.data
	if data == nil {
		return nil, false
	}
	r.giveLocked(contentPlace{id, off})
	if delete(run.wants, off); len(run.wants) == 0 {
		r.dropLocked(run)
	} else {
		r.aheadLocked(run)
	}
	return data[off-run.off : off-run.off+length : off-run.off+length], true
}

// giveLocked remembers a content that was read.
func (r *packRuns) giveLocked(c contentPlace) {
	if r.given[c] {
		return
	}
	if len(r.giveNext) >= maxGiven {
		delete(r.given, r.giveNext[0])
		r.giveNext = r.giveNext[1:]
	}
	r.given[c] = true
	r.giveNext = append(r.giveNext, c)
}

// aheadLocked starts to fetch the runs after one that is read.
func (r *packRuns) aheadLocked(run *packRun) {
	at := slices.Index(r.order, run)
	if at < 0 {
		return
	}
	for _, next := range r.order[at+1:] {
		if r.flying >= maxRequests {
			return
		}
		if next.ready == nil && !r.beginLocked(next, false) {
			return
		}
	}
}

// beginLocked fetches a run if there is room. A run that a reader waits for replaces
// fetched runs that were not read yet.
func (r *packRuns) beginLocked(run *packRun, waited bool) bool {
	size := run.end - run.off
	for i := 0; waited && r.held+size > maxHeld && i < len(r.order); {
		if old := r.order[i]; old.data != nil && old != run {
			r.dropLocked(old)
			continue
		}
		i++
	}
	if r.held+size > maxHeld || r.fetch == nil || r.stopped {
		return false
	}
	r.held += size
	r.flying++
	ctx, cancel := context.WithTimeout(r.ctx, runTimeout)
	run.ready, run.cancel = make(chan struct{}), cancel
	fetch := r.fetch
	r.wg.Go(func() {
		defer cancel()
		data, err := fetch(ctx, run.pack, run.off, size)
		if err == nil && int64(len(data)) != size {
			err = errShortRun
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.flying--
		if err != nil {
			r.dropLocked(run)
		} else if !run.gone {
			run.data = data
		}
		close(run.ready)
	})
	return true
}

var errShortRun = errors.New("the storage returned fewer bytes than were asked for")

// dropLocked forgets a run. Readers that have its bytes keep them.
func (r *packRuns) dropLocked(run *packRun) {
	if run.gone {
		return
	}
	run.gone = true
	if run.ready != nil {
		r.held -= run.end - run.off
		if run.data == nil {
			run.cancel()
		}
	}
	run.data = nil
	without := func(list []*packRun) []*packRun {
		return slices.DeleteFunc(list, func(o *packRun) bool { return o == run })
	}
	r.order = without(r.order)
	if r.packs[run.pack] = without(r.packs[run.pack]); len(r.packs[run.pack]) == 0 {
		delete(r.packs, run.pack)
	}
}

// forget drops the runs of a pack that was written or deleted, or all runs for "".
func (r *packRuns) forget(id blob.ID) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, run := range slices.Clone(r.order) {
		if id == "" || run.pack == id {
			r.dropLocked(run)
		}
	}
	if id == "" {
		clear(r.given)
		r.giveNext = nil
	}
}

// touchLocked postpones the time at which all is forgotten.
func (r *packRuns) touchLocked() {
	if r.idle == nil {
		r.idle = time.AfterFunc(idleRuns, func() { r.forget("") })
		return
	}
	r.idle.Reset(idleRuns)
}

// close ends the fetches.
func (r *packRuns) close() {
	if r == nil {
		return
	}
	r.mu.Lock()
	r.stopped = true
	if r.idle != nil {
		r.idle.Stop()
	}
	r.mu.Unlock()
	r.forget("")
	r.cancel()
	r.wg.Wait()
}

package repository

import (
	"context"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

const (
	// indexPrefixAll begins the names of all index blobs of epochs (kopia
	// internal/epoch/epoch_manager.go).
	indexPrefixAll blob.ID = "x"
	// listLife is how long after its start a list answers for its refresh.
	listLife = 10 * time.Second
	// manyBlobs is the largest number of index blobs for one list. A storage returns about
	// a thousand names at a time, so with more, Kopia's concurrent lists are faster.
	manyBlobs = 3000
)

// refreshLists are the concurrent lists with which Kopia begins each refresh of the
// index: of epoch markers, deletion watermarks, and epochs merged alone and in ranges.
var refreshLists = []blob.ID{"xe", "xw", "xs", "xr"}

// epochList matches the prefix of an epoch's blobs that are not merged.
var epochList = regexp.MustCompile(`^xn[0-9]+_$`)

// indexLists answers the six or seven lists of one refresh of Kopia's index from one list of
// all index blobs.
//
// Kopia first lists what refreshLists names, concurrently, and then each epoch that is not
// settled, by the numbers in the first lists. A list of one refresh never answers for another: the
// four carry the same context, each is answered once, and one of them with another context begins
// a new list. An epoch's list is answered after all four were, once, within listLife, and while
// this process has written no index blob. So each answer has all that was written before the
// refresh began, as Kopia's own lists together have. docs/design/speed.md says why that is enough.
type indexLists struct {
	now func() time.Time

	mu   sync.Mutex
	last *indexList
	off  bool // there are too many blobs

	names map[blob.ID]bool // of the newest list that is complete
}

// indexList is one list of all index blobs.
type indexList struct {
	begun    time.Time
	by       context.Context // of the refresh; nil until one takes it
	done     chan struct{}
	blobs    []blob.Metadata // in order; valid once done is closed
	err      error
	answered map[blob.ID]bool // guarded by indexLists.mu
}

// lister lists blobs of a storage.
type lister func(ctx context.Context, prefix blob.ID, do func(blob.Metadata) error) error

// begin announces a list for the first refresh, before Kopia requests it; the caller runs run
// at once, which returns the blobs.
func (l *indexLists) begin(ctx context.Context, list lister) (run func() []blob.Metadata) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.newList()
	l.last = n
	return func() []blob.Metadata { l.fill(ctx, n, list); return n.blobs }
}

func (l *indexLists) newList() *indexList {
	return &indexList{begun: l.now(), done: make(chan struct{}), answered: map[blob.ID]bool{}}
}

// youngLocked reports whether the newest list may still answer. It uses the wall clock, which
// continues while a machine sleeps.
func (l *indexLists) youngLocked() bool {
	if l.last == nil {
		return false
	}
	age := l.now().Round(0).Sub(l.last.begun.Round(0))
	return age >= 0 && age < listLife
}

func (l *indexLists) fill(ctx context.Context, n *indexList, list lister) {
	n.err = list(ctx, indexPrefixAll, func(m blob.Metadata) error {
		n.blobs = append(n.blobs, m)
		return nil
	})
	// Most storages list in order.
	slices.SortFunc(n.blobs, func(a, b blob.Metadata) int { return strings.Compare(string(a.BlobID), string(b.BlobID)) })
	l.mu.Lock()
	defer l.mu.Unlock()
	if n.err != nil && l.last == n {
		l.last = nil
	}
	if n.err == nil {
		l.off = len(n.blobs) > manyBlobs
		l.names = map[blob.ID]bool{}
		for _, m := range n.blobs[:min(len(n.blobs), manyBlobs)] {
			l.names[m.BlobID] = true
		}
	}
	close(n.done)
}

// list answers one of Kopia's lists; ok is false if the storage must be asked.
func (l *indexLists) list(ctx context.Context, prefix blob.ID, list lister, do func(blob.Metadata) error) (ok bool, err error) {
	if l == nil {
		return false, nil
	}
	n, mine := l.take(ctx, prefix)
	if n == nil {
		return false, nil
	}
	if mine {
		l.fill(ctx, n, list)
	}
	select {
	case <-n.done:
	case <-ctx.Done():
		l.drop(n)
		return true, ctx.Err() //nolint:wrapcheck // the caller's own
	}
	if n.err != nil {
		return mine, n.err // after another's failure ask the storage
	}
	at, _ := slices.BinarySearchFunc(n.blobs, prefix, func(m blob.Metadata, p blob.ID) int { return strings.Compare(string(m.BlobID), string(p)) })
	for _, m := range n.blobs[at:] {
		if !strings.HasPrefix(string(m.BlobID), string(prefix)) {
			break
		}
		if err := do(m); err != nil {
			return true, err
		}
	}
	return true, nil
}

// take returns the list that answers for a prefix, nil for none; mine is set if the caller
// is to fill it.
func (l *indexLists) take(ctx context.Context, prefix blob.ID) (n *indexList, mine bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	young := l.youngLocked()
	switch {
	case l.off || !reflect.TypeOf(ctx).Comparable():
		return nil, false
	case slices.Contains(refreshLists, prefix):
		n = l.last
		if !young || n.answered[prefix] || n.by != nil && n.by != ctx {
			n, mine = l.newList(), true
			l.last = n
		}
		n.by = ctx
	case epochList.MatchString(string(prefix)) && young && !l.last.answered[prefix] && l.last.complete():
		n = l.last
	default:
		return nil, false
	}
	n.answered[prefix] = true
	return n, mine
}

// complete reports whether the refresh has all its first lists.
func (n *indexList) complete() bool {
	for _, p := range refreshLists {
		if !n.answered[p] {
			return false
		}
	}
	select {
	case <-n.done:
		return n.err == nil
	default:
		return false
	}
}

func (l *indexLists) drop(n *indexList) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == n {
		l.last = nil
	}
}

// again lets the newest list answer for one more refresh, if it is at least as new as
// this process's last write.
func (l *indexLists) again() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.youngLocked() && l.last.complete() {
		l.last.by, l.last.answered = nil, map[blob.ID]bool{}
	}
}

// known returns the names in the newest list that is complete. It must not be modified.
func (l *indexLists) known() map[blob.ID]bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.names
}

// changed is called before and after this process writes or deletes a blob.
func (l *indexLists) changed(id blob.ID) {
	if l == nil || !strings.HasPrefix(string(id), string(indexPrefixAll)) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = nil
}

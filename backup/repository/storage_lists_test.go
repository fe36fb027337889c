package repository

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

// listStorage is what indexLists reads from in a test.
type listStorage struct {
	mu    sync.Mutex
	blobs []blob.ID
	asked []blob.ID
	err   error
}

func (s *listStorage) list(_ context.Context, prefix blob.ID, do func(blob.Metadata) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, prefix)
	if s.err != nil {
		return s.err
	}
	for _, id := range s.blobs {
		if strings.HasPrefix(string(id), string(prefix)) {
			if err := do(blob.Metadata{BlobID: id, Length: int64(len(id))}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *listStorage) put(id blob.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs = append(s.blobs, id)
}

// took returns the requests to the storage since the last call.
func (s *listStorage) took() []blob.ID {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() { s.asked = nil }()
	return s.asked
}

// newTestLists returns lists whose clock stands still: they answer for a time only.
func newTestLists() *indexLists {
	at := time.Now()
	return &indexLists{now: func() time.Time { return at }}
}

// listOf lists as Kopia does, through l.
func listOf(ctx context.Context, l *indexLists, s *listStorage, prefix blob.ID) (ids []blob.ID, err error) {
	each := func(m blob.Metadata) error {
		if m.Length != int64(len(m.BlobID)) {
			return fmt.Errorf("%s has another length", m.BlobID)
		}
		ids = append(ids, m.BlobID)
		return nil
	}
	ok, err := l.list(ctx, prefix, s.list, each)
	if !ok {
		err = s.list(ctx, prefix, each)
	}
	return ids, err
}

// refreshAs lists as one refresh of Kopia's does: the first lists concurrently.
func refreshAs(t *testing.T, l *indexLists, s *listStorage, epochs ...int) map[blob.ID][]blob.ID {
	t.Helper()
	out := map[blob.ID][]blob.ID{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ask := func(ctx context.Context, prefix blob.ID) {
		wg.Go(func() {
			got, err := listOf(ctx, l, s, prefix)
			if err != nil {
				t.Errorf("list %s: %v", prefix, err)
			}
			mu.Lock()
			defer mu.Unlock()
			out[prefix] = got
		})
	}
	for _, p := range refreshLists {
		ask(ctx, p)
	}
	wg.Wait()
	again, stop := context.WithCancel(t.Context())
	defer stop()
	for _, e := range epochs {
		ask(again, blob.ID(fmt.Sprintf("xn%d_", e)))
	}
	wg.Wait()
	return out
}

// TestListsOfARefresh compares the answers with those of the storage, and counts: one list
// per refresh, which has all that any process wrote before the refresh began.
func TestListsOfARefresh(t *testing.T) {
	t.Parallel()
	s, l := &listStorage{}, newTestLists()
	rng := rand.New(rand.NewPCG(1, 2))
	kinds := []string{"xe%d", "xw%d", "xs%d_%x", "xr0_%d_%x", "xn0_%x", "xn1_%x", "xn10_%x", "xn2_%x", "p%x", "q%x", "s%x", "kopia.%x"}
	for round := range 200 {
		for range rng.IntN(4) {
			kind := kinds[rng.IntN(len(kinds))]
			args := []any{rng.IntN(1 << 20), rng.IntN(1 << 20)}
			s.put(blob.ID(fmt.Sprintf(kind, args[:strings.Count(kind, "%")]...)))
		}
		got := refreshAs(t, l, s, 0, 1, 2)
		if asked := s.took(); !slices.Equal(asked, []blob.ID{"x"}) {
			t.Fatalf("round %d: the storage was asked for %v", round, asked)
		}
		for prefix, ids := range got {
			want, err := listOf(t.Context(), nil, s, prefix)
			slices.Sort(want)
			slices.Sort(ids)
			if err != nil || !slices.Equal(ids, want) {
				t.Fatalf("round %d: %s lists %v, want %v, %v", round, prefix, ids, want, err)
			}
		}
		s.took()
	}
}

// TestListsAreNotReused: each list that must not be reused goes to the storage.
func TestListsAreNotReused(t *testing.T) {
	t.Parallel()
	s, l := &listStorage{blobs: []blob.ID{"xn0_a", "xn1_a"}}, newTestLists()
	at := time.Now()
	l.now = func() time.Time { return at }
	expect := func(what string, prefix blob.ID, want ...blob.ID) {
		t.Helper()
		s.put("xn0_" + blob.ID(fmt.Sprint(len(s.blobs))))
		got, err := listOf(t.Context(), l, s, prefix)
		fresh, _ := listOf(t.Context(), nil, s, prefix)
		s.asked = s.asked[:len(s.asked)-1]
		if err != nil || len(got) != len(fresh) {
			t.Errorf("%s: %v of %v, %v", what, got, fresh, err)
		}
		if asked := s.took(); !slices.Equal(asked, want) {
			t.Errorf("%s: the storage was asked for %v, want %v", what, asked, want)
		}
	}
	expect("an epoch before any refresh", "xn0_", "xn0_")
	refreshAs(t, l, s, 0)
	s.took()
	expect("an epoch a second time", "xn0_", "xn0_")
	refreshAs(t, l, s)
	s.took()
	l.changed("xn0_own")
	expect("an epoch after a write of this process", "xn0_", "xn0_")
	refreshAs(t, l, s)
	s.took()
	l.changed("p123")
	at = at.Add(listLife)
	expect("an epoch long after", "xn0_", "xn0_")
	at = at.Add(-time.Hour)
	refreshAs(t, l, s)
	s.took()
	at = at.Add(-time.Minute)
	expect("an epoch after the clock was set back", "xn0_", "xn0_")
	expect("another prefix", "xn", "xn")
	expect("packs", "p", "p")
	// An interrupted refresh leaves nothing to the next.
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := listOf(ctx, l, s, "xe"); err != nil {
		t.Error(err)
	}
	cancel()
	s.took()
	got := refreshAs(t, l, s, 0)
	if asked := s.took(); !slices.Equal(asked, []blob.ID{"x"}) || len(got["xn0_"]) != len(s.blobs)-1 {
		t.Errorf("after half a refresh %v was asked for, %v listed", asked, got)
	}
	// Nor does one whose list failed.
	s.err = errors.New("broken")
	if _, err := listOf(t.Context(), l, s, "xs"); !errors.Is(err, s.err) {
		t.Errorf("a failed list: %v", err)
	}
	s.err = nil
	s.took()
	refreshAs(t, l, s, 0)
	if asked := s.took(); !slices.Equal(asked, []blob.ID{"x"}) {
		t.Errorf("after a failed list %v was asked for", asked)
	}
	// The next refresh may use this one's list if it requests that.
	l.again()
	s.put("xn0_late")
	if got := refreshAs(t, l, s, 0, 1); len(s.took()) != 0 || slices.Contains(got["xn0_"], "xn0_late") {
		t.Errorf("the list did not answer once more: %v", got)
	}
	l.again()
	l.changed("xn0_late")
	if got := refreshAs(t, l, s, 0, 1); len(s.took()) != 1 || !slices.Contains(got["xn0_"], "xn0_late") {
		t.Errorf("a list from before a write answered: %v", got)
	}
	// With very many, Kopia's own lists are faster.
	for i := range manyBlobs {
		s.put(blob.ID(fmt.Sprintf("xn7_%d", i)))
	}
	refreshAs(t, l, s, 0)
	s.took()
	refreshAs(t, l, s, 0)
	if asked := s.took(); len(asked) != 5 {
		t.Errorf("of very many blobs %v was asked for", asked)
	}
}

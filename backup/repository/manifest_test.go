package repository_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/kopia/kopia/repo"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

const noteKind = "test"

// notes returns the numbers of the records that Varve sees.
func notes(t *testing.T, r *repository.Repository) []int {
	t.Helper()
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	recs, err := r.ListRecords(t.Context(), noteKind, nil)
	if err != nil {
		t.Fatal(err)
	}
	var out []int
	for _, rec := range recs {
		var n int
		if ok, err := r.LoadRecord(t.Context(), rec.ID, &n); err != nil || !ok {
			t.Fatalf("record %s: %v, %v", rec.ID, ok, err)
		}
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// kopiaNotes returns those that Kopia's own manifest manager sees.
func kopiaNotes(t *testing.T, r *repotest.Repo) []int {
	t.Helper()
	var out []int
	r.Write(t, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		found, err := w.FindManifests(ctx, map[string]string{"type": "varve", "varve": noteKind})
		for _, e := range found {
			var n int
			if _, err := w.GetManifest(ctx, e.ID, &n); err != nil {
				return err
			}
			out = append(out, n)
		}
		return err
	})
	slices.Sort(out)
	return out
}

// putNote writes a record in a separate session and returns its ID.
func putNote(t *testing.T, r *repository.Repository, n int, drop ...string) string {
	t.Helper()
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	id, err := w.PutRecord(t.Context(), noteKind, map[string]string{"n": fmt.Sprint(n)}, n)
	if err != nil {
		t.Fatal(err)
	}
	for _, old := range drop {
		if err := w.DeleteRecord(t.Context(), old); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	return id
}

// TestManifestsBesideKopia writes, deletes and merges manifests by Varve and Kopia in
// turn: both always see the same.
func TestManifestsBesideKopia(t *testing.T) {
	t.Parallel()
	store := repotest.New(t)
	r := store.Open(t)
	var want []int
	ids := map[int]string{}
	same := func(when string) {
		t.Helper()
		if got := notes(t, r); !slices.Equal(got, want) {
			t.Errorf("%s Varve sees %v, want %v", when, got, want)
		}
		if got := kopiaNotes(t, store); !slices.Equal(got, want) {
			t.Errorf("%s Kopia sees %v, want %v", when, got, want)
		}
	}
	n := 0
	for round := range 3 {
		for range 25 { // both merge sixteen contents
			ids[n] = putNote(t, r, n)
			want = append(want, n)
			n++
		}
		for _, gone := range []int{want[0], want[7]} {
			ids[n] = putNote(t, r, n, ids[gone])
			want = append(slices.DeleteFunc(want, func(v int) bool { return v == gone }), n)
			n++
		}
		same(fmt.Sprintf("after Varve wrote in round %d", round))
		for range 20 {
			store.Write(t, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
				id, err := w.PutManifest(ctx, map[string]string{"type": "varve", "varve": noteKind}, n)
				ids[n] = string(id)
				return err
			})
			want = append(want, n)
			n++
		}
		gone := want[3]
		store.Write(t, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			found, err := w.FindManifests(ctx, map[string]string{"n": fmt.Sprint(gone)})
			for _, e := range found {
				if err := w.DeleteManifest(ctx, e.ID); err != nil {
					return err
				}
			}
			if len(found) != 1 {
				return fmt.Errorf("%d manifests of number %d: %w", len(found), gone, err)
			}
			return err
		})
		want = slices.DeleteFunc(want, func(v int) bool { return v == gone })
		same(fmt.Sprintf("after Kopia wrote in round %d", round))
	}
}

// TestMergeKeepsDeletions: a session that merges a view from before a deletion
// must not bring back what was deleted.
func TestMergeKeepsDeletions(t *testing.T) {
	t.Parallel()
	store := repotest.New(t)
	a, b := store.Open(t), store.Open(t)
	first := putNote(t, a, 1)
	for n := range 20 {
		putNote(t, a, 100+n)
	}
	if got := notes(t, b); len(got) != 21 {
		t.Fatalf("%v", got)
	}
	w, err := b.NewWriter(t.Context(), "test") // sees the first record, and will merge
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.PutRecord(t.Context(), noteKind, nil, 2); err != nil {
		t.Fatal(err)
	}
	putNote(t, a, 3, first)
	for n := range 20 { // a merges, too
		putNote(t, a, 200+n)
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	fresh := store.Open(t)
	for n := range 40 {
		putNote(t, fresh, 300+n)
	}
	got := notes(t, fresh)
	if slices.Contains(got, 1) || !slices.Contains(got, 2) || !slices.Contains(got, 3) || len(got) != 82 {
		t.Errorf("the records are %v", got)
	}
}

// TestSnapshotOutOfReach: the list of snapshots has changed since it was read, and the storage
// fails. That a snapshot cannot be read says nothing about it.
func TestSnapshotOutOfReach(t *testing.T) {
	t.Parallel()
	store := repotest.New(t)
	other := store.Open(t)
	put := func() string {
		t.Helper()
		w, err := other.NewWriter(t.Context(), "test")
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		s := &repository.Snapshot{Source: repository.Source{User: "shop", Host: "test", Path: "/db"}, Start: other.Now(), End: other.Now()}
		if err := w.SaveSnapshot(t.Context(), s, nil); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		return s.ManifestID
	}
	id := put()
	r, f := store.OpenFaulty(t)
	if infos, err := r.ListSnapshots(t.Context(), nil); err != nil || len(infos) != 1 {
		t.Fatalf("%v, %v", infos, err)
	}
	put()
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.Add(repotest.Fault{Op: repotest.Get, Prefix: "q"})
	if _, err := r.LoadSnapshot(t.Context(), id); !errors.Is(err, repository.ErrStorageFailed) || !errors.Is(err, repotest.ErrInjected) {
		t.Errorf("with storage that fails: %v", err)
	}
	f.Clear()
	if s, err := r.LoadSnapshot(t.Context(), id); err != nil || s.ManifestID != id || s.Source.User != "shop" {
		t.Errorf("afterwards: %+v, %v", s, err)
	}
	if _, err := r.LoadSnapshot(t.Context(), "0123456789abcdef0123456789abcdef"); !errors.Is(err, repository.ErrSnapshotNotFound) {
		t.Errorf("one that is not there: %v", err)
	}
	note := putNote(t, other, 1)
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.LoadSnapshot(t.Context(), note); err == nil || errors.Is(err, repository.ErrStorageFailed) {
		t.Errorf("a manifest that is no snapshot: %v", err)
	}
}

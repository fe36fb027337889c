package store

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/populator/store/storetest"
)

// What waits for its turn keeps its points from everyone, and no longer than it waits.
func TestLeases(t *testing.T) {
	x := newShared(t)
	ctx, ref := t.Context(), v1alpha1.StoreReference{Kind: v1alpha1.StoreKindBackupStore, Name: "main"}
	with := func(do func(*Open) error) {
		t.Helper()
		if err := x.With(ctx, x.st, func(_ context.Context, o *Open) error { return do(o) }); err != nil {
			t.Fatal(err)
		}
	}
	var pts []*points.Point
	for _, name := range []string{"a", "b"} {
		with(func(o *Open) error {
			p, _, err := backup.Run(ctx, o.Repository, backup.Options{Disk: storetest.Zeroes(1 << 20), Volume: points.Volume{Namespace: "shop", Name: name, Cluster: "here"}})
			pts = append(pts, p)
			return err
		})
	}
	var expires time.Time // the last of all
	held := func() (out []string) {
		t.Helper()
		with(func(o *Open) error {
			all, err := points.Leases(ctx, o.Repository)
			for id, on := range all {
				for _, l := range on {
					out = append(out, id[:4]+" "+l.Purpose)
					if l.Expires.After(expires) {
						expires = l.Expires
					}
				}
			}
			return err
		})
		slices.Sort(out)
		return out
	}
	a, b := pts[0].ID, pts[1].ID
	l := &Leases{Stores: x.Stores, wait: calm, patience: calm}
	keep := func(user types.UID, ids ...string) {
		t.Helper()
		if err := l.Keep(ctx, user, ref, "", "restore "+string(user), ids...); err != nil {
			t.Fatal(err)
		}
	}
	want := func(what string, leases ...string) {
		t.Helper()
		slices.Sort(leases)
		if got := held(); !slices.Equal(got, leases) {
			t.Errorf("%s: leases %q, want %q", what, got, leases)
		}
	}
	keep("1", a)
	keep("2", a, b)
	keep("1", a)
	want("two objects", a[:4]+" restore 1", a[:4]+" restore 2", b[:4]+" restore 2")
	with(func(o *Open) error {
		if _, err := backup.Forget(ctx, o.Repository, backup.ForgetOptions{Names: []string{a}, Cluster: "here"}); !errors.Is(err, points.ErrLeased) || !strings.Contains(err.Error(), "restore 1") {
			t.Errorf("a point that a restore waits for can be forgotten: %v", err)
		}
		return nil
	})

	// Renewed, though only when it is time to.
	first := expires
	l.held["1"].wrote = l.held["1"].wrote.Add(-points.LeaseRenewal)
	keep("1", a)
	want("renewed", a[:4]+" restore 1", a[:4]+" restore 2", b[:4]+" restore 2")
	if !expires.After(first) {
		t.Errorf("it expires at %v as before", first)
	}

	// The connection may have been closed in between.
	x.Connections.Forget(x.st.Key)
	l.Release(ctx, "2")
	l.Release(ctx, "unknown")
	want("released", a[:4]+" restore 1")
	l.Release(ctx, "1")
	want("all released")

	with(func(o *Open) error {
		_, err := backup.Forget(ctx, o.Repository, backup.ForgetOptions{Names: []string{a}, Cluster: "here"})
		return err
	})
	if err := l.Keep(ctx, "3", ref, "", "restore", a); !errors.Is(err, points.ErrNoSuchPoint) {
		t.Errorf("of a deleted point: %v", err)
	}
	if err := l.Keep(ctx, "3", ref, "", "restore", a); !errors.Is(err, points.ErrNoSuchPoint) {
		t.Errorf("of a deleted point, asked again: %v", err)
	}
	l.Release(ctx, "3")
	want("of a deleted point")

	// An object that was removed by hand is forgotten.
	keep("4", b)
	l.held["4"].asked, l.swept = time.Time{}, time.Time{}
	keep("5", b)
	if l.held["4"] != nil || l.held["5"] == nil {
		t.Errorf("objects: %v", l.held)
	}
}

// calm is longer than a busy machine takes to write a lease.
const calm = 5 * time.Minute

// A store that is silent holds up an object for a moment, and the next ones not at all.
func TestLeasesOfSilentStore(t *testing.T) {
	x := newShared(t)
	silent := make(chan struct{})
	x.before = func(ctx context.Context) error {
		select {
		case <-silent:
			return errors.New("no route to host")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	l := &Leases{Stores: x.Stores, patience: calm}
	ref := v1alpha1.StoreReference{Kind: v1alpha1.StoreKindBackupStore, Name: "main"}
	key := KeyOf(ref, "")
	state := func() answers {
		l.mu.Lock()
		defer l.mu.Unlock()
		return *l.stores[key]
	}
	for _, object := range []types.UID{"1", "2", "3"} {
		if err := l.Keep(t.Context(), object, ref, "", "restore", "0123456789abcdef0123456789abcdef"); err != nil {
			t.Error(err)
		}
	}
	if s := state(); s.slow != 1 {
		t.Errorf("%d attempts at once", s.slow)
	}
	l.Release(t.Context(), "1")
	close(silent)
	for end := time.Now().Add(calm); state().slow > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the attempt does not end")
		}
	}
	if state().failed.IsZero() {
		t.Error("that it failed is not known")
	}
}

// A store that cannot be written to, or does not answer, stops no restore here.
func TestLeasesWithoutStore(t *testing.T) {
	x := newShared(t)
	l := &Leases{Stores: x.Stores, wait: calm, patience: calm}
	ref := v1alpha1.StoreReference{Kind: v1alpha1.StoreKindBackupStore, Name: "main"}
	for name, change := range map[string]func(){
		"does not answer": func() { x.before = func(context.Context) error { return errors.New("no route to host") } },
		"read-only": func() {
			x.object.Spec.Access = v1alpha1.AccessReadOnly
			if err := x.client.Update(t.Context(), x.object); err != nil {
				t.Fatal(err)
			}
		},
	} {
		change()
		if err := l.Keep(t.Context(), types.UID(name), ref, "", "restore", "0123456789abcdef0123456789abcdef"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		opened := x.count()
		if err := l.Keep(t.Context(), types.UID(name), ref, "", "restore", "0123456789abcdef0123456789abcdef"); err != nil || x.count() != opened {
			t.Errorf("%s: asked again at once: %v", name, err)
		}
		l.Release(t.Context(), types.UID(name))
	}
	if err := l.Keep(t.Context(), "missing", v1alpha1.StoreReference{Kind: v1alpha1.StoreKindBackupStore, Name: "gone"}, "", "restore", "id"); err != nil {
		t.Errorf("without a store: %v", err)
	}
}

package store

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// shared is a BackupStore on a directory, opened through Connections that count.
type shared struct {
	*Stores
	repo   *repotest.Repo
	st     *Store
	object *v1alpha1.BackupStore
	client client.Client

	mu     sync.Mutex
	opened int
	before func(context.Context) error // each opening
}

func newShared(t *testing.T) *shared {
	t.Helper()
	s := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(s), v1alpha1.AddToScheme(s)); err != nil {
		t.Fatal(err)
	}
	r := repotest.New(t)
	object := &v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: "main", UID: "main"}, Spec: v1alpha1.BackupStoreSpec{RepositorySpec: v1alpha1.RepositorySpec{
		Storage:     v1alpha1.Storage{Volume: &v1alpha1.VolumeStorage{ClaimName: filepath.Base(filepath.Dir(r.Dir)), Path: "blobs"}},
		ClusterName: "here", CredentialsSecretRef: corev1.LocalObjectReference{Name: "creds"}}}}
	c := fake.NewClientBuilder().WithScheme(s).WithObjects(object,
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "creds"}, Data: Credentials{KeyPassword: []byte(repotest.Password)}}).Build()
	x := &shared{repo: r, object: object, client: c, Stores: &Stores{
		Client: c, Secrets: c, Namespace: "varve", Dir: t.TempDir(), VolumesDir: filepath.Dir(filepath.Dir(r.Dir)), Connections: NewConnections(),
	}}
	t.Cleanup(x.Connections.Close)
	real := x.Connections.open
	x.Connections.open = func(ctx context.Context, s Settings, opt OpenOptions) (*Open, error) {
		x.mu.Lock()
		x.opened++
		before := x.before
		x.mu.Unlock()
		if before != nil {
			if err := before(ctx); err != nil {
				return nil, err
			}
		}
		return real(ctx, s, opt)
	}
	x.st = x.FromBackupStore(object)
	return x
}

func (x *shared) count() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.opened
}

func (x *shared) nothing(ctx context.Context) error {
	return x.With(ctx, x.st, func(context.Context, *Open) error { return nil })
}

// All users of a store share one connection, which sees what others wrote.
func TestConnectionIsShared(t *testing.T) {
	x := newShared(t)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if err := x.nothing(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := x.count(); n != 1 {
		t.Errorf("opened %d times, want once", n)
	}
	oid := x.repo.WriteObjects(t, repotest.Object{Data: []byte("theirs")})[0]
	if err := x.With(t.Context(), x.st, func(ctx context.Context, o *Open) error {
		state, err := o.StateOf(ctx, oid)
		if err == nil && !state.Found {
			err = errors.New("what another process wrote is not seen")
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if n := x.count(); n != 1 {
		t.Errorf("opened %d times, want once", n)
	}
}

// Other credentials, another repository in the same place and a deleted store end a
// connection; its last user closes one that is in use.
func TestConnectionIsReplaced(t *testing.T) {
	x := newShared(t)
	held, err := x.Open(t.Context(), x.st)
	if err != nil {
		t.Fatal(err)
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "creds"}, Data: Credentials{KeyPassword: []byte("wrong")}}
	if err := x.client.Update(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	if err := x.nothing(t.Context()); !errors.Is(err, repository.ErrWrongPassword) {
		t.Errorf("with a password that is wrong: %v", err)
	}
	if _, err := held.Status(t.Context()); err != nil {
		t.Errorf("one that was opened before: %v", err)
	}
	if err := held.Close(t.Context()); err != nil {
		t.Error(err)
	}
	secret.Data = Credentials{KeyPassword: []byte(repotest.Password)}
	if err := x.client.Update(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	if err := x.nothing(t.Context()); err != nil {
		t.Errorf("with the right password again: %v", err)
	}
	if n := x.count(); n != 3 {
		t.Errorf("opened %d times, want 3", n)
	}
	x.Connections.Forget(x.st.Key)
	x.st.Status.UniqueID = "another"
	if err := x.nothing(t.Context()); !errors.Is(err, ErrOtherRepository) {
		t.Errorf("it is not the repository that it was: %v", err)
	}
	if n := x.count(); n != 4 {
		t.Errorf("opened %d times, want 4", n)
	}
	if err := x.client.Delete(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	if err := x.nothing(t.Context()); !errors.Is(err, ErrCredentials) {
		t.Errorf("without credentials: %v", err)
	}
	x.Connections.mu.Lock()
	defer x.Connections.mu.Unlock()
	if len(x.Connections.byKey) != 0 {
		t.Errorf("%d connections of stores that may not be used", len(x.Connections.byKey))
	}
}

// Opening continues when its callers have gone, and all callers share a failure for a while.
func TestOpeningGoesOn(t *testing.T) {
	x := newShared(t)
	synctest.Test(t, func(t *testing.T) {
		x.Connections = NewConnections()
		var opened atomic.Int32
		broken := errors.New("broken")
		var fails error
		x.Connections.open = func(ctx context.Context, _ Settings, _ OpenOptions) (*Open, error) {
			opened.Add(1)
			time.Sleep(3 * time.Minute)
			return nil, errors.Join(fails, broken)
		}
		try := func(patience time.Duration) error {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			return x.nothing(ctx)
		}
		for range 2 {
			if err := try(time.Minute); !errors.Is(err, ErrOpening) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("while it is being opened: %v", err)
			}
		}
		for range 3 {
			if err := try(2 * time.Minute); !errors.Is(err, broken) {
				t.Errorf("when opening has failed: %v", err)
			}
		}
		if n := opened.Load(); n != 1 {
			t.Errorf("opened %d times, want once", n)
		}
		time.Sleep(failureHolds)
		if err := try(time.Minute); !errors.Is(err, ErrOpening) || opened.Load() != 2 {
			t.Errorf("later it is tried again: %v, opened %d times", err, opened.Load())
		}
		x.Connections.Close()
	})
}

// A tenant's server that forever sends just enough holds its place only for a while; an
// administrator's store may be slow.
func TestTenantsOpeningIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewConnections()
		defer p.Close()
		p.open = func(ctx context.Context, _ Settings, _ OpenOptions) (*Open, error) {
			select {
			case <-time.After(time.Hour):
				return nil, errors.New("opened")
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		for key, want := range map[Key]time.Duration{
			{Kind: v1alpha1.StoreKindRepository, Namespace: "shop", Name: "own"}: tenantsPatience,
			{Kind: v1alpha1.StoreKindBackupStore, Name: "main"}:                  time.Hour,
		} {
			begun := time.Now()
			_, err := p.Get(t.Context(), key, Settings{}, OpenOptions{}, false)
			if took := time.Since(begun); took != want || err == nil || errors.Is(err, repository.ErrUnreachable) != (want == tenantsPatience) {
				t.Errorf("%s: %v after %v, want %v", key, err, took, want)
			}
		}
	})
}

// settled waits until no connection has a user: what has opened one is a user for a moment more.
func (x *shared) settled(t *testing.T) {
	t.Helper()
	used := func() (users int) {
		x.Connections.mu.Lock()
		defer x.Connections.mu.Unlock()
		for _, c := range x.Connections.byKey {
			users += c.refs
		}
		return users
	}
	for end := time.Now().Add(calm); used() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a connection has a user")
		}
	}
}

// Unused connections are closed if there are too many.
func TestIdleConnectionsAreFew(t *testing.T) {
	x := newShared(t)
	for i := range maxIdle + 3 {
		x.st.Key.Name, x.st.UID = fmt.Sprint("s", i), types.UID(fmt.Sprint("s", i))
		if err := x.nothing(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	x.settled(t)
	x.Connections.mu.Lock()
	defer x.Connections.mu.Unlock()
	if n := len(x.Connections.byKey); n != maxIdle || x.Connections.byKey[x.st.Key] == nil {
		t.Errorf("%d connections, want %d with the newest of them", n, maxIdle)
	}
}

// Without shared Connections each opening has a private one.
func TestOpenWithoutConnections(t *testing.T) {
	x := newShared(t)
	x.Connections.Close()
	x.Connections = nil
	if err := x.nothing(t.Context()); err != nil {
		t.Error(err)
	}
}

// A namespace has one place at a time, tenants do not get all places, and the least served goes
// first.
func TestPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces()
		var order []string
		leave := map[string]func(){}
		enter := func(name, namespace string) {
			go func() {
				l, err := p.enter(t.Context(), namespace)
				if err != nil {
					return
				}
				order = append(order, name)
				leave[name] = l
			}()
			synctest.Wait()
		}
		want := func(names ...string) {
			t.Helper()
			synctest.Wait()
			if fmt.Sprint(order) != fmt.Sprint(names) {
				t.Errorf("entered %v, want %v", order, names)
			}
			order = nil
		}
		enter("a1", "a")
		enter("a2", "a")
		enter("b1", "b")
		want("a1", "b1")
		leave["a1"]()
		want("a2")
		var others []string
		for i := range tenantsPlaces - 2 {
			name := fmt.Sprint("t", i)
			others = append(others, name)
			enter(name, name)
		}
		want(others...)
		enter("a3", "a")
		enter("c1", "c")
		for i := range placesInAll - tenantsPlaces {
			enter(fmt.Sprint("admin", i), "")
		}
		want("admin0", "admin1", "admin2", "admin3")
		enter("admin4", "")
		want()
		leave["b1"]()
		want("admin4")
		leave["a2"]()
		want("c1") // a was served before
		leave["t0"]()
		want("a3")
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			if _, err := p.enter(ctx, "c"); err == nil {
				t.Error("entered though its namespace has a place")
			}
		}()
		synctest.Wait()
		cancel()
		synctest.Wait()
		if len(p.waiting) != 0 {
			t.Errorf("%d wait", len(p.waiting))
		}
	})
}

// A look at the storage whose callers have gone keeps its connection: closed under it, the process would end.
func TestLookOutlivesItsCallers(t *testing.T) {
	x := newShared(t)
	if err := x.nothing(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := x.Connections
	p.mu.Lock()
	c := p.byKey[x.st.Key]
	p.mu.Unlock()
	refs := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		return c.refs
	}
	x.settled(t)
	until := func(users int) {
		t.Helper()
		for end := time.Now().Add(calm); refs() != users; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the connection has %d users, want %d", refs(), users)
			}
		}
	}
	c.fresh.serial.Lock() // the look does not get on
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	called := make(chan error, 1)
	go func() { called <- x.nothing(ctx) }()
	until(2) // the call, and the look
	cancel()
	if err := <-called; !errors.Is(err, context.Canceled) {
		t.Errorf("a call that waits for the storage: %v", err)
	}
	p.Forget(x.st.Key)
	if n := refs(); n != 1 || errors.Is(c.open.Answering(t.Context(), func(context.Context) error { return nil }, func() {}), repository.ErrClosed) {
		t.Errorf("%d users, or it is closed", n)
	}
	c.fresh.serial.Unlock()
	p.Close()
	until(0)
}

package serve

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// client serves a catalogue and enters a point as a client.
func client(t *testing.T, c nbdserver.Catalog, name string, limit time.Duration, contexts ...string) *nbdclient.Export {
	t.Helper()
	_, path := nbdtest.Serve(t, nbdserver.Config{Catalog: c, ReadTimeout: limit})
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	cl, err := nbdclient.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cl.Negotiate(nbdclient.Structured); err != nil {
		t.Fatal(err)
	}
	if len(contexts) > 0 {
		if got, err := cl.SetContexts(name, contexts...); err != nil || len(got) != len(contexts) {
			t.Fatalf("contexts %v: %v", got, err)
		}
	}
	e, err := cl.Go(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

// If storage does not answer, each read takes the same time and fails in the same way; what
// was read before is still served; and when the storage is back the reads work, also of the
// blocks that were waited for.
func TestStorageGone(t *testing.T) {
	const (
		soon  = time.Second      // for clients whose reads are to fail
		limit = 30 * time.Second // of one object: a busy machine reads one within it
	)
	data := make([]byte, 8<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	for name, fault := range map[string]repotest.Fault{
		"silent": {},
		// A call that ignores cancellation, as in a broken mount.
		"deaf": {Deaf: true},
		// A call that fails at once.
		"refusing": {Err: errors.New("connection refused")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it mostly waits
			r, faults := repotest.New(t).OpenFaulty(t)
			p := save(t, r, "c", "shop/db", data)
			cache := image.NewCache(64 << 20)
			cache.LimitReads(limit)
			defer cache.Close()
			c, err := Open(t.Context(), r, cache, Options{Cluster: "c", ReadTimeout: limit, Linger: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := c.Close(context.Background()); err != nil {
					t.Error(err)
				}
			}()
			patient := client(t, c, p.Name(), 0)
			e := client(t, c, p.Name(), soon)
			if fault.Err != nil {
				e = patient
			}
			ctx, cancel := context.WithTimeout(t.Context(), 4*nbdtest.Timeout) // of several steps
			defer cancel()
			got := make([]byte, 4096)
			read := func(e *nbdclient.Export, off int64) error {
				_, err := e.ReadAt(ctx, got, off)
				if err == nil && !bytes.Equal(got, data[off:off+4096]) {
					t.Fatalf("other bytes at %d", off)
				}
				return err
			}
			if err := read(patient, 0); err != nil {
				t.Fatal(err)
			}
			hold, want := make(chan struct{}), "connection refused"
			if fault.Err == nil {
				want = "did not arrive within " + soon.String()
				fault.Hold, fault.Err = hold, errors.New("gone")
			}
			faults.Add(fault)
			refreshed := make(chan error, 1)
			rctx, stop := context.WithCancel(ctx)
			defer stop()
			go func() { refreshed <- c.Refresh(rctx) }()
			const far = 7 << 20 // beyond read-ahead
			fails := func(i int, err error, want string) {
				t.Helper()
				if !errors.Is(err, proto.EIO) || !strings.Contains(err.Error(), p.Name()) || !strings.Contains(err.Error(), want) {
					t.Errorf("read %d of what is not there: %v", i, err)
				}
			}
			for i := range 3 {
				// Several requests for the same block, too.
				second := make(chan error, 1)
				go func() {
					_, err := e.ReadAt(ctx, make([]byte, 512), far)
					second <- err
				}()
				for _, err := range []error{read(e, far), <-second} {
					fails(i, err, want)
				}
				if err := read(patient, 0); err != nil {
					t.Errorf("read %d of what was read before: %v", i, err)
				}
			}
			if e != patient { // one that waits longer sees the object given up, so that none is on its way when the storage is back
				fails(3, read(patient, far), "did not answer in time ("+limit.String()+")")
			}
			faults.Clear()
			close(hold)
			stop()
			<-refreshed
			if err := read(patient, far); err != nil {
				t.Errorf("the storage is back: %v", err)
			}
			if err := c.Refresh(ctx); err != nil {
				t.Errorf("the storage is back: %v", err)
			}
		})
	}
}

func forget(t *testing.T, r *repository.Repository, p *points.Point) error {
	t.Helper()
	_, err := backup.Forget(t.Context(), r, backup.ForgetOptions{Names: []string{p.ID}, Cluster: "c"})
	return err
}

// The base that a client selected is held like the disk, keeps its meaning, and is released
// with it.
func TestBaseIsLeased(t *testing.T) {
	r := repotest.New(t).Open(t)
	data := text(1<<20, 1)
	base := save(t, r, "c", "shop/db", data)
	data[700_000]++
	top := save(t, r, "c", "shop/db", data)
	c := openCatalog(t, r, Options{Linger: time.Millisecond})
	leases := func(p *points.Point) int {
		t.Helper()
		held, err := points.Leases(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		return len(held[p.ID])
	}
	const alias = "qemu:dirty-bitmap:shop/db@latest~1"
	for name, cat := range map[string]nbdserver.Catalog{
		"plain":      nbdserver.NewAliases(c, time.Hour, nil),
		"restricted": nbdserver.Restrict(nbdserver.NewAliases(c, time.Hour, nil), []nbdserver.AccessRule{{Client: "*", Export: "shop/*"}}),
	} {
		t.Run(name, func(t *testing.T) {
			e := client(t, cat, top.Name(), 0, proto.ContextAllocation, alias)
			if leases(base) != 1 {
				t.Fatalf("%d leases on what the client compares with", leases(base))
			}
			if err := forget(t, r, base); !errors.Is(err, points.ErrLeased) {
				t.Errorf("forget: %v", err)
			}
			changed := func() (n int64) {
				t.Helper()
				err := e.Map(t.Context(), alias, 0, int64(e.Size), func(_ int64, x nbdclient.Extent) bool {
					if x.Flags != 0 {
						n += x.Length
					}
					return true
				})
				if err != nil {
					t.Error(err)
				}
				return n
			}
			want := changed()
			if want == 0 || want == int64(e.Size) {
				t.Errorf("%d bytes changed", want)
			}
			// The alias means another point now, but not to this client.
			if name == "plain" {
				data[0]++
				newer := save(t, r, "c", "shop/db", data)
				if err := c.Refresh(t.Context()); err != nil {
					t.Fatal(err)
				}
				if n := changed(); n != want {
					t.Errorf("%d bytes changed, not %d, after another backup", n, want)
				}
				if err := forget(t, r, newer); err != nil {
					t.Fatal(err)
				}
				if err := c.Refresh(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if err := e.Close(); err != nil {
				t.Error(err)
			}
			for leases(base) > 0 {
				if err := t.Context().Err(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

package backup

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestOpenHangingStorage opens a repository whose storage accepts a request and never
// answers, with and without regard to cancellation: after the time limit one sentence says
// so. In a bubble time passes only while all of it waits, so that no slow machine is taken for the storage; and what
// was given up has ended before the repository is removed.
func TestOpenHangingStorage(t *testing.T) {
	for _, row := range []struct {
		name  string
		fault repotest.Fault
	}{
		{"format", repotest.Fault{Op: repotest.Get, Prefix: "kopia"}},
		{"format, deaf", repotest.Fault{Op: repotest.Get, Prefix: "kopia", Deaf: true}},
		{"indexes", repotest.Fault{Op: repotest.List}},
		{"indexes, deaf", repotest.Fault{Op: repotest.List, Deaf: true}},
		{"manifests", repotest.Fault{Op: repotest.Get, Prefix: "q"}},
		{"manifests, deaf", repotest.Fault{Op: repotest.Get, Prefix: "q", Deaf: true}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			conf, f := repotest.New(t).ConnectFaulty(t)
			synctest.Test(t, func(t *testing.T) {
				row.fault.Hold, row.fault.Entered = make(chan struct{}), make(chan struct{})
				row.fault.Err = repotest.ErrInjected
				f.Add(row.fault)
				r, err := repository.Open(t.Context(), repository.OpenOptions{
					ConfigFile: conf, Password: repotest.Password, Timeout: 200 * time.Millisecond,
				})
				if err == nil {
					t.Fatal(errors.Join(errors.New("it opened"), r.Close(t.Context())))
				}
				<-row.fault.Entered
				close(row.fault.Hold)
				if !errors.Is(err, repository.ErrUnreachable) || !strings.Contains(err.Error(), "does not answer") || strings.Contains(err.Error(), "\n") {
					t.Errorf("open: %v", err)
				}
			})
		})
	}
}

// TestOpenSlowStorage opens a repository whose storage is slow for each answer, in all slower
// than the limit for silence: it is slow, not dead.
func TestOpenSlowStorage(t *testing.T) {
	conf, f := repotest.New(t).ConnectFaulty(t)
	synctest.Test(t, func(t *testing.T) {
		const late = 40 * time.Second
		f.Add(repotest.Fault{Delay: late})
		begun := time.Now()
		r, err := repository.Open(t.Context(), repository.OpenOptions{ConfigFile: conf, Password: repotest.Password})
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took < 2*repository.OpenTimeout {
			t.Errorf("it took %v: nothing was tried", took)
		}
		f.Clear()
		if err := r.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestOpenIsInterrupted: an open that hangs ends with its context.
func TestOpenIsInterrupted(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		conf, f := repotest.New(t).ConnectFaulty(t)
		synctest.Test(t, func(t *testing.T) { // which waits for what was given up
			hold, entered := make(chan struct{}), make(chan struct{})
			f.Add(repotest.Fault{Op: repotest.Get, Hold: hold, Entered: entered, Deaf: deaf, Err: repotest.ErrInjected})
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-entered
				cancel()
			}()
			_, err := repository.Open(ctx, repository.OpenOptions{ConfigFile: conf, Password: repotest.Password})
			close(hold)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("deaf %v: %v", deaf, err)
			}
		})
	}
}

// TestBackupWithSlowStorage delays every operation of storage.
func TestBackupWithSlowStorage(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	s.f.Add(repotest.Fault{Delay: 20 * time.Millisecond})
	s.change()
	s.backup(s.faulty)
	p := mustList(t, s.faulty).Latest(testVolume)
	if got, err := s.restored(s.faulty, p); err != nil || !bytes.Equal(got, s.want[p.ID]) {
		t.Errorf("restore: %v", err)
	}
	s.f.Clear()
	s.check()
}

// TestInterruptWhileStorageHangs cancels a backup whose storage took a write and
// does not answer: it ends, and the next one works.
func TestInterruptWhileStorageHangs(t *testing.T) {
	for _, prefix := range []string{"p", "q", "x"} {
		t.Run(prefix, func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			conf, f := s.repo.ConnectFaulty(t)
			hanging, err := repository.Open(t.Context(), repository.OpenOptions{
				ConfigFile: conf, Password: repotest.Password, Grace: 100 * time.Millisecond,
			})
			if err != nil {
				t.Fatal(err)
			}
			entered := make(chan struct{})
			f.Add(repotest.Fault{Op: repotest.Put, Prefix: prefix, Hold: make(chan struct{}), Entered: entered})
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-entered
				cancel()
			}()
			s.change()
			_, _, err = Run(ctx, hanging, s.options())
			if !errors.Is(err, context.Canceled) {
				t.Errorf("backup: %v", err)
			}
			f.Clear()
			if err := hanging.Close(t.Context()); err != nil {
				t.Error(err)
			}
			s.backup(s.clean)
			s.check()
		})
	}
}

// TestInterruptKeepsWhatWasStored cancels a backup that has stored blocks: they
// are found by the next run, which uploads the rest only.
func TestInterruptKeepsWhatWasStored(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	// A loaded machine may need more than the usual grace to save what was stored.
	conf, _ := s.repo.ConnectFaulty(t)
	patient := openWith(t, repository.OpenOptions{ConfigFile: conf, Password: repotest.Password, Grace: time.Hour})
	opt := s.options()
	opt.Full, opt.Volume = true, points.Volume{Namespace: "shop", Name: "new", Cluster: "test"}
	opt.Workers = 1 // jobs that run when the second segment ends are no part of the first
	data := make([]byte, 3*blocktree.SegmentSize)
	for i := range 3 {
		copy(data[i*blocktree.SegmentSize:], randomBytes(s.rng, 2<<20))
	}
	opt.Disk = &memDisk{data: data}
	ends := 0
	opt.step = func(step string) {
		if step != "segment" {
			return
		}
		if ends++; ends == 2 {
			cancel()
		}
	}
	if _, _, err := Run(ctx, patient, opt); !errors.Is(err, context.Canceled) {
		t.Fatalf("backup: %v", err)
	}
	if n := len(mustList(t, s.clean).Incomplete()); n != 1 {
		t.Fatalf("%d incomplete points", n)
	}
	opt.step = nil
	_, rec, err := Run(t.Context(), s.clean, opt)
	if err != nil {
		t.Fatal(err)
	}
	if rec.Stats.Uploaded > 9<<19 { // two of three parts, and indexes
		t.Errorf("the next run uploaded %d bytes", rec.Stats.Uploaded)
	}
}

package backup

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// faultSite is a repository seen through storage that fails on demand, and
// through one that does not.
type faultSite struct {
	t             *testing.T
	repo          *repotest.Repo
	faulty, clean *repository.Repository
	f             *repotest.Faults
	rng           *rand.Rand
	data          []byte            // of the disk
	want          map[string][]byte // what each point holds, by ID
	tried         [][]byte          // what backups that failed would have stored
	look          func()            // checks after each fault; check, if not set
}

func newFaultSite(t *testing.T) *faultSite {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s := &faultSite{t: t, repo: repotest.New(t), rng: rand.New(rand.NewPCG(seed, 0)), want: map[string][]byte{}}
	s.clean = s.repo.Open(t)
	s.faulty, s.f = s.repo.OpenFaulty(t)
	s.data = randomBytes(s.rng, 1<<20+777)
	for range 2 {
		s.change()
		s.backup(s.clean)
	}
	if err := s.faulty.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Once per connection: the runs of a sweep write the same number of blobs.
	if err := s.faulty.CheckRights(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// change writes to two places of the disk.
func (s *faultSite) change() {
	s.data = bytes.Clone(s.data)
	for range 2 {
		copy(s.data[s.rng.IntN(len(s.data)-3000):], randomBytes(s.rng, 3000))
	}
}

// options are of runs without checkpoints, which write the same blobs however slow the machine is.
func (s *faultSite) options() Options {
	return Options{
		Volume: testVolume, Disk: &memDisk{data: s.data}, BlockSize: 64 << 10, Workers: 2,
		CheckpointEvery: time.Hour, protectAfter: time.Hour,
	}
}

// backup makes a point of the disk, which must work.
func (s *faultSite) backup(r *repository.Repository) *points.Point {
	s.t.Helper()
	p, _, err := Run(s.t.Context(), r, s.options())
	if err != nil {
		s.t.Fatalf("a backup without faults: %v", err)
	}
	s.want[p.ID] = s.data
	return p
}

// try makes a point of the disk, which may fail.
func (s *faultSite) try() error {
	s.t.Helper()
	p, _, err := Run(s.t.Context(), s.faulty, s.options())
	if err == nil {
		s.want[p.ID] = s.data
	} else {
		s.tried = append(s.tried, s.data)
	}
	return err
}

// check reads every point through storage without faults. A point that was not returned must
// be one that a backup wrote just before it failed.
func (s *faultSite) check() {
	s.t.Helper()
	pts := mustList(s.t, s.clean).Points()
	found := 0
	for _, p := range pts {
		want, known := s.want[p.ID]
		got := readPoint(s.t, s.clean, p)
		if !known {
			for _, data := range s.tried {
				if bytes.Equal(got, data) {
					s.want[p.ID], want, known = data, data, true
				}
			}
		}
		if !known || !bytes.Equal(got, want) {
			s.t.Errorf("%s reads back different (known: %v)", p.Name(), known)
		}
		found++
	}
	if found != len(s.want) {
		s.t.Errorf("%d points, want %d", found, len(s.want))
	}
}

// thin forgets all points but two, so that a long sweep does not grow.
func (s *faultSite) thin() {
	s.t.Helper()
	all := mustList(s.t, s.clean).Of(testVolume)
	for _, p := range all[:max(0, len(all)-2)] {
		if _, err := Forget(s.t.Context(), s.clean, ForgetOptions{Names: []string{p.ID}, Cluster: testVolume.Cluster}); err != nil {
			s.t.Fatal(err)
		}
		delete(s.want, p.ID)
	}
}

// sweep counts the operations of a run, then makes each of them fail once, and fail
// permanently from there: about as many operations as most says, from a random one on, or all
// with VARVE_FAULTS=all. run returns what the user would see.
func (s *faultSite) sweep(op repotest.Op, most int, run func() error) {
	s.t.Helper()
	run = s.fromStorage(run)
	before := s.f.Ops(op)
	if err := run(); err != nil {
		s.t.Fatalf("without faults: %v", err)
	}
	n := s.f.Ops(op) - before
	if n == 0 {
		s.t.Logf("no %s", op)
		return
	}
	failed := 0
	for _, count := range []int{1, 0} {
		if count == 0 && op == repotest.List {
			continue // Kopia lists its indexes again and again until it can
		}
		step := max(1, (2*n+most-1)/most)
		if os.Getenv("VARVE_FAULTS") == "all" {
			step = 1
		}
		for skip := s.rng.IntN(step); skip < n; skip += step {
			s.f.Add(repotest.Fault{Op: op, Skip: skip, Count: count})
			err := run()
			s.f.Clear()
			if err != nil {
				failed++
				if !errors.Is(err, repotest.ErrInjected) {
					s.t.Errorf("%s number %d: another error: %v", op, skip, err)
				} else if !strings.Contains(err.Error(), string(op)+" ") {
					s.t.Errorf("%s number %d: the error names no object: %v", op, skip, err)
				}
				if failed == 1 {
					s.t.Logf("%s number %d of %d: %v", op, skip, n, err)
				}
			}
			if s.look == nil {
				s.check()
			} else {
				s.look()
			}
		}
	}
	s.t.Logf("%s: %d operations, %d runs failed", op, n, failed)
	if failed == 0 && op != repotest.Delete && op != repotest.List {
		s.t.Errorf("no fault of %s was ever noticed", op)
	}
}

// fromStorage has each run read from the storage what the one before left in memory.
func (s *faultSite) fromStorage(run func() error) func() error {
	return func() error {
		s.faulty.ReadFromStorage()
		return run()
	}
}

var allOps = []repotest.Op{repotest.Put, repotest.Get, repotest.List, repotest.Metadata, repotest.Delete}

// TestBackupWithFailingStorage makes each operation of storage fail during an increment. The
// run fails or makes a right point, older ones do not change, and the same process makes the
// next one.
func TestBackupWithFailingStorage(t *testing.T) {
	for _, op := range allOps {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			s.sweep(op, 8, func() error {
				s.change()
				return s.try()
			})
			s.backup(s.faulty)
			s.change()
			s.backup(s.clean)
			s.check()
			if _, err := Verify(t.Context(), s.clean, VerifyOptions{Read: 1}); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestStorageFullDuringBackup fills storage at each write of an increment.
func TestStorageFullDuringBackup(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	before := s.f.Ops(repotest.Put)
	s.change()
	s.backup(s.faulty)
	n := s.f.Ops(repotest.Put) - before
	for skip := range n {
		s.change()
		s.f.Add(repotest.Fault{Op: repotest.Put, Skip: skip, Err: fmt.Errorf("write pack: %w", syscall.ENOSPC)})
		err := s.try()
		s.f.Clear()
		if !errors.Is(err, repository.ErrStorageFull) || !strings.Contains(err.Error(), "free") {
			t.Errorf("write number %d: %v", skip, err)
		}
		if strings.Count(err.Error(), "varve prune") != 1 {
			t.Errorf("write number %d says not, or not once, how to make room: %v", skip, err)
		}
		s.check()
	}
	s.backup(s.faulty)
	s.check()
}

// TestStorageFullWhileMakingRoom: a command that frees storage must not advise itself.
func TestStorageFullWhileMakingRoom(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	newest := mustList(t, s.clean).Points()[1]
	s.f.Add(repotest.Fault{Op: repotest.Put, Err: fmt.Errorf("write pack: %w", syscall.ENOSPC)})
	for name, do := range map[string]func() error{
		"forget": func() error {
			_, err := Forget(t.Context(), s.faulty, ForgetOptions{Names: []string{newest.ID}, Cluster: testVolume.Cluster})
			return err
		},
		"prune": func() error {
			_, err := Prune(t.Context(), s.faulty, PruneOptions{Policy: Policy{Latest: 1}, Cluster: testVolume.Cluster})
			return err
		},
		"maintenance": func() error {
			_, err := Maintain(t.Context(), s.faulty, MaintainOptions{Mode: repository.MaintenanceFull, NoSafety: true})
			return err
		},
	} {
		err := do()
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("%s: %v", name, err)
		}
		if text := err.Error(); strings.Contains(text, "varve ") || !strings.Contains(text, "without varve") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestBackupNoticesLostWrites: storage reports writes that did not happen, or only in part. A
// backup stores again what it can detect; no point is reported that does not read back.
func TestBackupNoticesLostWrites(t *testing.T) {
	for _, fault := range []repotest.Fault{
		{Op: repotest.Put, Prefix: "p", Count: 1, Lose: true},
		{Op: repotest.Put, Prefix: "x", Count: 1, Lose: true},
		{Op: repotest.Put, Prefix: "x", Skip: 1, Count: 1, Lose: true},
		{Op: repotest.Put, Prefix: "x", Skip: 2, Count: 1, Lose: true},
		{Op: repotest.Put, Prefix: "p", Count: 1, Truncate: 150_000},
		{Op: repotest.Put, Prefix: "q", Skip: 1, Count: 1, Lose: true}, // with the point's manifest
		{Op: repotest.Put, Prefix: "q", Skip: 1, Count: 1, Truncate: 2500},
	} {
		what := "lost"
		if fault.Truncate > 0 {
			what = "truncated"
		}
		t.Run(fmt.Sprintf("%s %s%d", what, fault.Prefix, fault.Skip), func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			s.change()
			before := s.f.Ops(repotest.Put)
			s.f.Add(fault)
			err := s.try()
			s.f.Clear()
			t.Logf("%d writes: %v", s.f.Ops(repotest.Put)-before, err)
			s.check()
			s.change()
			s.backup(s.faulty)
			s.change()
			s.backup(s.clean)
			s.check()
			if _, verr := Verify(t.Context(), s.clean, VerifyOptions{Read: 1}); err == nil && verr != nil || err != nil && !errors.Is(verr, points.ErrDamaged) {
				t.Errorf("after a backup that said %v: %v", err, verr)
			}
			maintainNow(t, s.clean)
			s.check()
		})
	}
}

// TestLostManifestPack loses a pack with a point's manifest under a backup: the
// pack is named, the backup builds on what can be read, and both points are there
// once the pack is back.
func TestLostManifestPack(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	pts := mustList(t, s.clean).Points()
	state, err := s.clean.StateOf(t.Context(), pts[0].Root) // its manifest is in the same pack
	if err != nil {
		t.Fatal(err)
	}
	s.f.Add(repotest.Fault{Op: repotest.Get, Prefix: state.Pack, Err: repotest.ErrNotFound})
	s.change()
	s.backup(s.faulty)
	unreadable, err := s.faulty.UnreadableManifests(t.Context())
	if err != nil || len(unreadable) != 1 || unreadable[0].Pack != state.Pack || !errors.Is(unreadable[0].Err, repository.ErrContentMissing) {
		t.Errorf("unreadable: %+v, %v", unreadable, err)
	}
	if got := readPoint(t, s.faulty, pts[1]); !bytes.Equal(got, s.want[pts[1].ID]) {
		t.Error("the other point reads back different")
	}
	s.f.Clear()
	s.check()
	s.backup(s.faulty)
	s.check()
}

// TestManifestsOutOfReach: storage that fails for a moment must not make a point look
// missing.
func TestManifestsOutOfReach(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	s.backup(s.clean)
	if err := s.faulty.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.f.Add(repotest.Fault{Op: repotest.Get, Prefix: "q"})
	if cat, err := points.List(t.Context(), s.faulty, points.ListOptions{}); !errors.Is(err, repotest.ErrInjected) {
		t.Errorf("a list with storage that fails: %+v, %v", cat, err)
	}
	s.f.Clear()
	if cat, err := points.List(t.Context(), s.faulty, points.ListOptions{}); err != nil || len(cat.Points()) != 3 {
		t.Errorf("afterwards: %+v, %v", cat, err)
	}
}

// TestBackupWithLaggingLists: listings miss index blobs that were just written, as storage of
// eventual consistency does. The point must be right once the listing has caught up.
func TestBackupWithLaggingLists(t *testing.T) {
	for skip := range 3 {
		t.Run(fmt.Sprint(skip), func(t *testing.T) {
			t.Parallel()
			s := newFaultSite(t)
			s.change()
			s.f.Add(repotest.Fault{Op: repotest.List, Prefix: "x", Skip: skip, Hide: true})
			err := s.try()
			s.f.Clear()
			t.Log(err)
			s.check()
			s.change()
			s.backup(s.faulty)
			s.check()
		})
	}
}

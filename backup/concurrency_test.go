package backup

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// The tests of this file are the rows of docs/concurrency.md.

// TestTwoBackupsAtOnce runs a second backup of a volume inside the first, over another
// connection: both finish, and their points are siblings.
func TestTwoBackupsAtOnce(t *testing.T) {
	t.Parallel()
	r, conf := newRepo(t)
	pts, want := chain(t, r, testVolume, 1, 1<<20)
	one, two := bytes.Clone(want[0]), bytes.Clone(want[0])
	one[5]++
	two[900_000]++
	second := openRepo(t, conf)
	var inner *points.Point
	outer, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: one}, step: func(s string) {
		if s == "listed" {
			inner, _ = mustBackup(t, second, Options{Volume: testVolume, Disk: &memDisk{data: two}})
		}
	}})
	if inner.Parent != pts[0].ID || outer.Parent != pts[0].ID || inner.Generation != outer.Generation {
		t.Errorf("not siblings: %+v, %+v", inner, outer)
	}
	fresh := openRepo(t, conf)
	for _, c := range []struct {
		p    *points.Point
		want []byte
	}{{pts[0], want[0]}, {inner, two}, {outer, one}} {
		if !bytes.Equal(readPoint(t, fresh, c.p), c.want) {
			t.Errorf("%s reads back different", c.p.Name())
		}
	}
	cat := mustList(t, fresh)
	if len(cat.Points()) != 3 || len(cat.Incomplete()) != 0 {
		t.Errorf("%d points, %d incomplete", len(cat.Points()), len(cat.Incomplete()))
	}
	latest, again := cat.Latest(testVolume), mustList(t, r).Latest(testVolume)
	if latest.ID != again.ID || (latest.ID != inner.ID && latest.ID != outer.ID) {
		t.Errorf("latest is %s here and %s there", latest.Name(), again.Name())
	}
	next, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: one}})
	if next.Generation != outer.Generation+1 || next.Parent != latest.ID {
		t.Errorf("the next point has generation %d and parent %s", next.Generation, next.Parent)
	}
}

// backupSteps are the steps at which others interfere with a backup.
var backupSteps = []string{"prepared", "protected", "listed", "segment", "checkpoint", "stored", "flushed", "proved", "saved"}

// interfere runs a backup of disk; at its step others delete the points named by forget and
// run maintenance without safety. The result must be right: a point that reads back, or an
// error that says why not.
func interfere(t *testing.T, step string, protectAll bool, prepare func(t *testing.T, r *repository.Repository) (opt Options, forget []string, kept map[*points.Point][]byte)) {
	t.Helper()
	r, conf := newRepo(t)
	opt, forget, kept := prepare(t, r)
	want := opt.Disk.(*memDisk).data
	other := openRepo(t, conf)
	met := false
	opt.BlockSize = 64 << 10
	opt.protectAll = protectAll
	if step == "checkpoint" {
		opt.CheckpointEvery = time.Nanosecond // after each job
	}
	opt.step = func(s string) {
		if s != step || met {
			return
		}
		met = true
		if len(forget) > 0 {
			if _, err := Forget(t.Context(), other, ForgetOptions{Names: forget, Cluster: testVolume.Cluster, Force: true}); err != nil {
				t.Errorf("forget at %s: %v", step, err)
			}
		}
		res := maintainNow(t, other)
		t.Logf("at %s: %d contents deleted, %d packs", step, res.Unused.Count, res.Reclaimed.Count)
	}
	p, _, err := Run(t.Context(), r, opt)
	if !met {
		t.Fatalf("the backup has no step %s", step)
	}
	fresh := openFresh(t, conf)
	switch {
	case err == nil:
		if !bytes.Equal(readPoint(t, fresh, p), want) {
			t.Error("the new point reads back different")
		}
	case errors.Is(err, ErrLostData):
		t.Logf("the backup failed: %v", err)
	default:
		t.Errorf("the backup failed for another reason: %v", err)
	}
	for q, data := range kept {
		if !bytes.Equal(readPoint(t, fresh, q), data) {
			t.Errorf("%s, which nobody deleted, reads back different", q.Name())
		}
	}
	if _, err := Verify(t.Context(), fresh, VerifyOptions{Read: 1}); err != nil {
		t.Errorf("verify: %v", err)
	}
	// The next run succeeds, and a collection after it deletes nothing that is in use.
	opt.step = nil
	p, _ = mustBackup(t, fresh, opt)
	maintainNow(t, fresh)
	if !bytes.Equal(readPoint(t, other, p), want) {
		t.Error("the next point reads back different")
	}
}

// TestParentPrunedDuringBackup deletes and collects the parent at each step of
// an increment.
func TestParentPrunedDuringBackup(t *testing.T) {
	for _, step := range backupSteps {
		for _, protectAll := range []bool{false, true} {
			if protectAll && step != "protected" && step != "segment" {
				continue // the same as without, or the first flush has come
			}
			t.Run(fmt.Sprintf("%s,protectAll=%v", step, protectAll), func(t *testing.T) {
				t.Parallel()
				interfere(t, step, protectAll, func(t *testing.T, r *repository.Repository) (Options, []string, map[*points.Point][]byte) {
					pts, want := chain(t, r, testVolume, 2, 1<<20)
					data := append(bytes.Clone(want[1]), make([]byte, blocktree.SegmentSize)...)
					copy(data[300_000:], randomBytes(rand.New(rand.NewPCG(1, 1)), 200_000))
					return Options{Volume: testVolume, Disk: &memDisk{data: data}}, []string{pts[1].ID}, map[*points.Point][]byte{pts[0]: want[0]}
				})
			})
		}
	}
}

// TestGarbageReusedDuringCollection backs up what the repository still has, but
// no point uses: the backup stores nothing, and the collection deletes it.
func TestGarbageReusedDuringCollection(t *testing.T) {
	for _, step := range backupSteps {
		if step == "protected" {
			continue // a full has nothing to protect: the same as prepared
		}
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			interfere(t, step, false, func(t *testing.T, r *repository.Repository) (Options, []string, map[*points.Point][]byte) {
				other := points.Volume{Namespace: "shop", Name: "other", Cluster: "test"}
				kept, want := chain(t, r, other, 1, 500_000)
				data := append(randomBytes(rand.New(rand.NewPCG(2, 2)), 1<<20), make([]byte, blocktree.SegmentSize)...)
				p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}, BlockSize: 64 << 10})
				if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{p.ID}, Cluster: testVolume.Cluster}); err != nil {
					t.Fatal(err)
				}
				return Options{Volume: testVolume, Disk: &memDisk{data: data}}, nil, map[*points.Point][]byte{kept[0]: want[0]}
			})
		})
	}
}

// TestBackupDuringCollection makes a point at each step of a collection without safety,
// from data that the collection considers garbage.
func TestBackupDuringCollection(t *testing.T) {
	for _, step := range []string{"cleared", "marked", "swept", "collected", "rewritten", "dropped", "deleted"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			r, conf := newRepo(t)
			data := randomBytes(rand.New(rand.NewPCG(3, 3)), 1<<20)
			old, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}})
			if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{old.ID}, Cluster: testVolume.Cluster}); err != nil {
				t.Fatal(err)
			}
			writer := openRepo(t, conf)
			var p *points.Point
			_, err := Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceFull, NoSafety: true, step: func(s string) {
				if s == step && p == nil {
					p, _ = mustBackup(t, writer, Options{Volume: testVolume, Disk: &memDisk{data: data}})
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			if p == nil {
				t.Fatalf("maintenance has no step %s", step)
			}
			fresh := openFresh(t, conf)
			if !bytes.Equal(readPoint(t, fresh, p), data) {
				t.Error("reads back different")
			}
			maintainNow(t, fresh)
			if _, err := Verify(t.Context(), openFresh(t, conf), VerifyOptions{Read: 1}); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestReaderDuringRewrite reads points repeatedly while packs are rewritten and the old ones
// deleted.
func TestReaderDuringRewrite(t *testing.T) {
	t.Parallel()
	r, conf := newRepo(t)
	// Every second block changes each time, so that the packs that stay in use are of
	// one size and are merged.
	const block = 64 << 10
	var pts []*points.Point
	var want [][]byte
	rng := rand.New(rand.NewPCG(3, 3))
	data := randomBytes(rng, 1<<20)
	for n := range 4 {
		for off := n % 2 * block; n > 0 && off < len(data); off += 2 * block {
			copy(data[off:], randomBytes(rng, block))
		}
		p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: bytes.Clone(data)}, BlockSize: block})
		pts, want = append(pts, p), append(want, bytes.Clone(data))
	}
	reader := openRepo(t, conf)
	stop := make(chan struct{})
	var rounds sync.WaitGroup
	started := make(chan struct{})
	rounds.Go(func() {
		for n := 0; ; n++ {
			if !bytes.Equal(readPoint(t, reader, pts[3]), want[3]) {
				t.Error("reads back different")
			}
			if n == 0 {
				close(started)
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	<-started
	before := packFiles(t, conf, "p")
	if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{pts[0].ID, pts[1].ID}, Cluster: testVolume.Cluster}); err != nil {
		t.Error(err)
	}
	res, err := Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceFull, NoSafety: true})
	if err != nil {
		t.Error(err)
	}
	close(stop)
	rounds.Wait()
	if res.Rewritten.Count == 0 || res.Reclaimed.Count == 0 {
		t.Errorf("nothing moved: %+v", *res.MaintenanceReport)
	}
	left := map[string]bool{}
	for _, f := range packFiles(t, conf, "p") {
		left[f] = true
	}
	for _, f := range before {
		if left[f] {
			t.Errorf("%s was not deleted", f)
		}
	}
	if !bytes.Equal(readPoint(t, reader, pts[3]), want[3]) {
		t.Error("reads back different after the packs went")
	}
}

// TestRunThatStoodStill suspends a backup for more than a day at each of its steps, as on a
// machine that sleeps, while another host considers it dead and collects: the point is
// complete, or the backup fails and leaves none.
func TestRunThatStoodStill(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"protected", "checkpoint", "stored", "flushed", "proved", "saved"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			_, conf := newRepo(t)
			var slept atomic.Int64
			late := func() *repository.Repository {
				return openWith(t, repository.OpenOptions{
					ConfigFile: conf, Password: "secret", Now: func() time.Time { return time.Now().Add(time.Duration(slept.Load())) },
				})
			}
			// Kopia does not maintain if the clock and the storage's differ.
			r, dropper, other := late(), late(), openRepo(t, conf)
			data := randomBytes(rand.New(rand.NewPCG(6, 6)), 600_000)
			first, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: bytes.Clone(data)}})
			want := bytes.Clone(data)
			for i := 0; i < len(want); i += 100_000 {
				want[i]++
			}
			opt := Options{Volume: testVolume, Disk: &memDisk{data: want}, BlockSize: first.BlockSize, protectAll: true}
			if step == "checkpoint" {
				opt.CheckpointEvery = time.Nanosecond // after each job
			}
			met := false
			opt.step = func(s string) {
				if s != step || met {
					return
				}
				met = true
				slept.Add(int64(staleIncomplete + time.Hour))
				if err := dropper.Refresh(t.Context()); err != nil {
					t.Error(err)
				}
				if n, err := DropDeadRuns(t.Context(), dropper); n != 1 || err != nil {
					t.Errorf("%d dead runs were dropped: %v", n, err)
				}
				maintainNow(t, other)
			}
			p, _, err := Run(t.Context(), r, opt)
			if !met {
				t.Fatalf("the backup has no step %s", step)
			}
			pts := []*points.Point{first, p}
			if err != nil {
				if !errors.Is(err, ErrLostData) {
					t.Fatal(err)
				}
				t.Logf("the backup failed: %v", err)
				pts = pts[:1]
			}
			fresh := openFresh(t, conf)
			if got := mustList(t, fresh).Points(); len(got) != len(pts) {
				t.Errorf("%d points, want %d", len(got), len(pts))
			}
			for i, p := range pts {
				if !bytes.Equal(readPoint(t, fresh, p), [][]byte{data, want}[i]) {
					t.Errorf("%s reads back different", p.Name())
				}
			}
			// The next one works in any case.
			next, _ := mustBackup(t, fresh, Options{Volume: testVolume, Disk: &memDisk{data: want}})
			if !bytes.Equal(readPoint(t, fresh, next), want) {
				t.Error("the next point reads back different")
			}
		})
	}
}

// TestClocksApart backs up from two hosts whose clocks are hours apart: the
// order is that of the generations.
func TestClocksApart(t *testing.T) {
	t.Parallel()
	_, conf := newRepo(t)
	at := func(d time.Duration) *repository.Repository {
		return openWith(t, repository.OpenOptions{
			ConfigFile: conf, Password: "secret", Now: func() time.Time { return time.Now().Add(d) },
		})
	}
	ahead, behind := at(5*time.Hour), at(-7*time.Hour)
	data := randomBytes(rand.New(rand.NewPCG(4, 4)), 600_000)
	var ids []string
	for i, r := range []*repository.Repository{ahead, behind, ahead, behind} {
		data[i]++
		p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: bytes.Clone(data)}})
		if p.Generation != int64(i+1) || (i > 0 && p.Parent != ids[i-1]) {
			t.Errorf("point %d has generation %d and parent %s", i, p.Generation, p.Parent)
		}
		ids = append(ids, p.ID)
	}
	cat := mustList(t, behind)
	for i, p := range cat.Of(testVolume) {
		if p.ID != ids[i] {
			t.Errorf("point %d is listed as number %d", p.Generation, i+1)
		}
	}
	latest, err := points.Names{Catalog: cat, Cluster: testVolume.Cluster}.Read("shop/db@latest")
	if err != nil || latest.ID != ids[3] {
		t.Errorf("latest is %v, %v", latest, err)
	}
	plan, err := Prune(t.Context(), ahead, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"})
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Removed()) != 3 || mustList(t, behind).Latest(testVolume).ID != ids[3] {
		t.Errorf("pruned %v", plan.Removed())
	}
	if !bytes.Equal(readPoint(t, behind, latest), data) {
		t.Error("reads back different")
	}
}

// TestPointDeletedDuringVerify deletes and collects a point while a verify runs: it is
// reported as deleted, and not as damaged.
func TestPointDeletedDuringVerify(t *testing.T) {
	t.Parallel()
	r, conf := newRepo(t)
	pts, _ := chain(t, r, testVolume, 3, 1<<20)
	other := openRepo(t, conf)
	begun := false
	rep, err := Verify(t.Context(), r, VerifyOptions{Read: 1, Quarantine: true, Progress: func(Progress) {
		if begun {
			return
		}
		begun = true
		if _, err := Forget(t.Context(), other, ForgetOptions{Names: []string{pts[1].ID}, Cluster: testVolume.Cluster}); err != nil {
			t.Error(err)
		}
		maintainNow(t, other)
	}})
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Deleted) != 1 || rep.Deleted[0].ID != pts[1].ID || len(rep.Points) != 2 {
		t.Errorf("%d deleted, %d points", len(rep.Deleted), len(rep.Points))
	}
	if q, err := points.Quarantined(t.Context(), openFresh(t, conf)); err != nil || len(q) != 0 {
		t.Errorf("quarantined: %v, %v", q, err)
	}
}

// TestCollectionEndsBesideBackups has a backup write a checkpoint whenever a collection has
// looked for new manifests: it ends all the same. A point that is put back meanwhile is whole.
func TestCollectionEndsBesideBackups(t *testing.T) {
	t.Parallel()
	r, conf := newRepo(t)
	pts, want := chain(t, r, testVolume, 1, 1<<20)
	gone, data := chain(t, r, points.Volume{Namespace: "shop", Name: "gone", Cluster: "test"}, 1, 600_000)
	ctx := t.Context()
	saved, err := r.SaveManifest(ctx, gone[0].ManifestID)
	if err != nil {
		t.Fatal(err)
	}
	root, err := points.OpenRoot(ctx, r, pts[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{gone[0].ID}, Cluster: "test"}); err != nil {
		t.Fatal(err)
	}
	writer := openRepo(t, conf)
	checkpoint := func(w *repository.Writer) error {
		now := writer.Now()
		s := &repository.Snapshot{
			Source: testVolume.Source(), Start: now, End: now, Incomplete: incompleteReason, Tags: map[string]string{points.TagRunPID: "1"},
		}
		return w.SaveSnapshot(ctx, s, []repository.File{{Name: parentFile, Size: root.Size, ModTime: now, Mode: 0o600, Object: root.Object}})
	}
	looks := 0
	res, err := Maintain(ctx, r, MaintainOptions{Mode: repository.MaintenanceFull, NoSafety: true, step: func(s string) {
		if s == "taken back" {
			looks++
		}
		if s == "swept" || s == "taken back" && looks < 10 {
			changeRepo(t, writer, checkpoint)
		}
		if s == "taken back" && looks == 1 {
			changeRepo(t, writer, func(w *repository.Writer) error { return w.PutBack(ctx, saved) })
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if looks != 2 || res.Unused.Count == 0 || res.Recovered.Count == 0 {
		t.Errorf("%d looks: %+v", looks, *res.MaintenanceReport)
	}
	fresh := openFresh(t, conf)
	back := mustList(t, fresh).ByID(gone[0].ID)
	if back == nil || !bytes.Equal(readPoint(t, fresh, back), data[0]) || !bytes.Equal(readPoint(t, fresh, pts[0]), want[0]) {
		t.Error("reads back different")
	}
	if _, err := Verify(ctx, fresh, VerifyOptions{Read: 1}); err != nil {
		t.Error(err)
	}
}

// TestClockBehindCollection backs up what was just collected without safety margins, on a
// machine whose clock is behind: the backup fails, and says that it may be the clock.
func TestClockBehindCollection(t *testing.T) {
	t.Parallel()
	r, conf := newRepo(t)
	pts, want := chain(t, r, testVolume, 1, 600_000)
	if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{pts[0].ID}, Cluster: "test"}); err != nil {
		t.Fatal(err)
	}
	maintainNow(t, r)
	behind := openWith(t, repository.OpenOptions{
		ConfigFile: conf, Password: "secret", Now: func() time.Time { return time.Now().Add(-20 * time.Minute) },
	})
	opt := Options{Volume: testVolume, Disk: &memDisk{data: want[0]}, BlockSize: 64 << 10}
	if _, _, err := Run(t.Context(), behind, opt); !errors.Is(err, ErrLostData) || !strings.Contains(err.Error(), "clock") {
		t.Errorf("with a clock that is behind: %v", err)
	}
	p, _ := mustBackup(t, openFresh(t, conf), opt)
	if !bytes.Equal(readPoint(t, openFresh(t, conf), p), want[0]) {
		t.Error("with a clock that is right: reads back different")
	}
}

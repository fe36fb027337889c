package backup

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// chain makes n points of one volume, the first of size random bytes, each next
// with a few thousand of them changed, and returns what each holds.
func chain(t *testing.T, r *repository.Repository, v Volume, n, size int) (points []*Point, want [][]byte) {
	t.Helper()
	rng := rand.New(rand.NewPCG(uint64(n), uint64(size)))
	data := randomBytes(rng, size)
	for i := range n {
		if i > 0 {
			off := rng.IntN(len(data) - 5000)
			copy(data[off:], randomBytes(rng, 5000))
		}
		snap := bytes.Clone(data)
		p, _ := mustBackup(t, r, Options{Volume: v, Disk: &memDisk{data: snap}, BlockSize: 64 << 10})
		points, want = append(points, p), append(want, snap)
	}
	return points, want
}

func maintainNow(t *testing.T, r *repository.Repository) *MaintenanceResult {
	t.Helper()
	res, err := Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceFull, NoSafety: true})
	if err != nil {
		t.Fatal(err)
	}
	if res.Busy {
		t.Fatal("maintenance did not run")
	}
	return res
}

func mustList(t *testing.T, r *repository.Repository) *Catalog {
	t.Helper()
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	cat, err := List(t.Context(), r, ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return cat
}

// packFiles lists the packs of a repository made by newRepo, by path.
func packFiles(t *testing.T, conf, kind string) []string {
	t.Helper()
	var out []string
	root := filepath.Join(filepath.Dir(conf), "repo")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if strings.HasPrefix(rel, kind) && strings.Contains(rel, "-s") {
			out = append(out, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func packBytes(t *testing.T, conf string) int64 {
	t.Helper()
	var n int64
	for _, f := range append(packFiles(t, conf, "p"), packFiles(t, conf, "q")...) {
		st, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		n += st.Size()
	}
	return n
}

func TestForgetAndMaintenanceReclaim(t *testing.T) {
	r, conf := newRepo(t)
	points, want := chain(t, r, testVolume, 4, 6<<20)
	other := Volume{Namespace: "shop", Name: "big", Cluster: "test"}
	big, _ := chain(t, r, other, 1, 8<<20)
	before := packBytes(t, conf)
	if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{"shop/big@latest", points[0].ID, points[2].Name()}, Cluster: testVolume.Cluster}); err != nil {
		t.Fatal(err)
	}
	res := maintainNow(t, r)
	if res.Unused.Bytes < 8<<20 || len(res.Damaged) != 0 || res.Lost.Count != 0 {
		t.Errorf("result %+v", *res.MaintenanceReport)
	}
	if after := packBytes(t, conf); after > before-8<<20 {
		t.Errorf("packs took %d bytes, and %d after %s was collected", before, after, big[0].Name())
	}
	cat := mustList(t, r)
	if n := len(cat.Points()); n != 2 {
		t.Fatalf("%d points are left", n)
	}
	fresh := openRepo(t, conf)
	for _, i := range []int{1, 3} {
		if !bytes.Equal(readPoint(t, fresh, points[i]), want[i]) {
			t.Errorf("point %d reads back different", i)
		}
	}
	if _, err := Verify(t.Context(), fresh, VerifyOptions{Read: 1}); err != nil {
		t.Error(err)
	}
	st, err := r.MaintenanceState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !st.Owned || st.Reclaimed < 8<<20 || st.LastFull.End.IsZero() {
		t.Errorf("status %+v", st)
	}
}

func TestSafetyKeepsWhatIsYoung(t *testing.T) {
	r, conf := newRepo(t)
	points, _ := chain(t, r, testVolume, 2, 4<<20)
	before := len(packFiles(t, conf, "p"))
	if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{points[0].ID}, Cluster: testVolume.Cluster}); err != nil {
		t.Fatal(err)
	}
	res, err := Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceFull})
	if err != nil {
		t.Fatal(err)
	}
	if res.Unused.Count != 0 || res.TooRecent.Count == 0 || res.Reclaimed.Count != 0 {
		t.Errorf("result %+v", *res.MaintenanceReport)
	}
	if after := len(packFiles(t, conf, "p")); after != before {
		t.Errorf("%d packs, %d before", after, before)
	}
	res, err = Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceAuto})
	if err != nil || res.Mode != "" || res.Busy {
		t.Errorf("maintenance ran again: %+v, %v", *res.MaintenanceReport, err)
	}
}

// TestDamageIsNamedAndSurvived breaks the index of one point of a chain: that
// point is named and quarantined, the others stay readable and space is still
// reclaimed.
func TestDamageIsNamedAndSurvived(t *testing.T) {
	r, conf := newRepo(t)
	points, want := chain(t, r, testVolume, 2, 4<<20)
	third, _ := chain(t, r, Volume{Namespace: "shop", Name: "bad", Cluster: "test"}, 1, 3<<20)
	gone, _ := chain(t, r, Volume{Namespace: "shop", Name: "gone", Cluster: "test"}, 1, 5<<20)
	// Spoil the index of the third point, and nothing beside it in the pack.
	ctx := t.Context()
	root, err := OpenRoot(ctx, r, third[0])
	if err != nil {
		t.Fatal(err)
	}
	st, err := r.StateOf(ctx, root.Object)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, packPath(t, conf, st.Pack), st.Offset+st.Packed/2)
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{gone[0].ID}, Cluster: testVolume.Cluster}); err != nil {
		t.Fatal(err)
	}

	r2 := openFresh(t, conf) // without what the first one cached
	res := maintainNow(t, r2)
	if res.Unused.Bytes < 5<<20 {
		t.Errorf("only %d bytes were found unused", res.Unused.Bytes)
	}
	if len(res.Quarantined) != 1 || res.Quarantined[0].Point != third[0].ID {
		t.Fatalf("quarantined %+v", res.Quarantined)
	}
	for i, p := range points {
		if !bytes.Equal(readPoint(t, r2, p), want[i]) {
			t.Errorf("point %d reads back different", i)
		}
	}
	rep, err := Verify(ctx, r2, VerifyOptions{})
	if !errors.Is(err, ErrDamaged) {
		t.Fatalf("verify: %v", err)
	}
	for _, res := range rep.Points {
		if bad := len(res.Problems) > 0; bad != (res.Point.ID == third[0].ID) {
			t.Errorf("%s: %v", res.Point.Name(), res.Problems)
		}
	}
	t.Log(err)
}

// packPath returns the file of a pack of a repository made by newRepo.
func packPath(t *testing.T, conf, pack string) string {
	t.Helper()
	root := filepath.Join(filepath.Dir(conf), "repo")
	for _, f := range append(packFiles(t, conf, "p"), packFiles(t, conf, "q")...) {
		rel, err := filepath.Rel(root, f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.ReplaceAll(strings.TrimSuffix(rel, ".f"), string(filepath.Separator), "") == pack {
			return f
		}
	}
	t.Fatalf("no pack %s", pack)
	return ""
}

// openFresh opens the repository of conf with caches of its own.
func openFresh(t *testing.T, conf string) *repository.Repository {
	t.Helper()
	conf2 := filepath.Join(t.TempDir(), "repository.config")
	if err := repository.Connect(t.Context(), repository.ConnectOptions{
		ConfigFile: conf2, Password: "secret",
		Storage: &repository.Filesystem{Path: filepath.Join(filepath.Dir(conf), "repo")},
		Cache:   repository.Cache{Directory: conf2 + ".cache"},
	}); err != nil {
		t.Fatal(err)
	}
	return openRepo(t, conf2)
}

// TestVerifyQuarantineHeals corrupts a pack of data: verify names each block,
// quarantines the points, and the next backup of the same bytes heals them.
func TestVerifyQuarantineHeals(t *testing.T) {
	r, conf := newRepo(t)
	points, want := chain(t, r, testVolume, 3, 4<<20)
	for _, f := range packFiles(t, conf, "p") {
		flip(t, f, 70<<10)
	}
	ctx := t.Context()
	r2 := openFresh(t, conf)
	if _, err := Verify(ctx, r2, VerifyOptions{}); err != nil {
		t.Errorf("nothing is missing: %v", err)
	}
	rep, err := Verify(ctx, r2, VerifyOptions{Read: 1, Quarantine: true})
	if !errors.Is(err, ErrDamaged) {
		t.Fatalf("verify: %v", err)
	}
	t.Log(err)
	if rep.Forgotten == 0 {
		t.Error("no content was forgotten")
	}
	quarantined, err := Quarantined(ctx, r2)
	if err != nil {
		t.Fatal(err)
	}
	if len(quarantined) == 0 {
		t.Error("no point is quarantined")
	}
	maintainNow(t, r2)
	last, rec := mustBackup(t, r2, Options{Volume: testVolume, Disk: &memDisk{data: want[2]}, BlockSize: 64 << 10, Full: true})
	if rec.Parent != "" || !bytes.Equal(readPoint(t, r2, last), want[2]) {
		t.Error("the new point is not as it should be")
	}
	rep, _ = Verify(ctx, r2, VerifyOptions{Read: 1})
	for _, res := range rep.Points {
		if res.Point.ID == points[2].ID || res.Point.ID == last.ID {
			if len(res.Problems) > 0 {
				t.Errorf("%s is still damaged: %v", res.Point.Name(), res.Problems[0])
			}
		}
	}
	if quarantined, err = Quarantined(ctx, r2); err != nil {
		t.Fatal(err)
	}
	if _, still := quarantined[points[2].ID]; still {
		t.Error("the healed point is still quarantined")
	}
	records, err := LastVerified(ctx, r2)
	if err != nil {
		t.Fatal(err)
	}
	if vr := records[last.ID]; !vr.OK || vr.Read != 1 {
		t.Errorf("record %+v", vr)
	}
}

// TestVerifyRemembersDamage has a run that reads nothing, or little, come after one
// that read a block and found it wrong.
func TestVerifyRemembersDamage(t *testing.T) {
	r, conf := newRepo(t)
	points, want := chain(t, r, testVolume, 1, 4<<20)
	files := packFiles(t, conf, "p")
	for _, f := range files {
		flip(t, f, 70<<10)
	}
	ctx := t.Context()
	r2 := openFresh(t, conf)
	if _, err := Verify(ctx, r2, VerifyOptions{Read: 1}); !errors.Is(err, ErrDamaged) {
		t.Fatalf("verify: %v", err)
	}
	for _, share := range []float64{0, 0.000001} {
		rep, err := Verify(ctx, r2, VerifyOptions{Read: share})
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "--read 100%") {
			t.Errorf("a verify that read %v: %v, %+v", share, err, rep)
		}
		if last, err := LastVerified(ctx, r2); err != nil || last[points[0].ID].OK || last[points[0].ID].Read != 1 {
			t.Errorf("after a verify that read %v: %+v, %v", share, last, err)
		}
	}
	for _, f := range files { // somebody put a copy of the packs back
		flip(t, f, 70<<10)
	}
	r3 := openFresh(t, conf)
	if _, err := Verify(ctx, r3, VerifyOptions{Read: 1}); err != nil {
		t.Errorf("all is well again, and was read: %v", err)
	}
	if _, err := Verify(ctx, r3, VerifyOptions{}); err != nil {
		t.Error(err)
	}

	// Once damaged blocks are marked, any look tells: they are missing, or healed.
	for _, f := range files {
		flip(t, f, 70<<10)
	}
	r4 := openFresh(t, conf)
	if _, err := Verify(ctx, r4, VerifyOptions{Read: 1, Quarantine: true}); !errors.Is(err, ErrDamaged) {
		t.Fatalf("verify: %v", err)
	}
	if _, err := Verify(ctx, r4, VerifyOptions{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("the marked block is not missing: %v", err)
	}
	mustBackup(t, r4, Options{Volume: testVolume, Disk: &memDisk{data: want[0]}, BlockSize: 64 << 10, Full: true})
	if _, err := Verify(ctx, r4, VerifyOptions{}); err != nil {
		t.Errorf("healed: %v", err)
	}
}

// flip changes a byte of a file.
func flip(t *testing.T, path string, off int64) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if off >= int64(len(b)) {
		return
	}
	b[off] ^= 0x55
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestLeaseHoldsPoint(t *testing.T) {
	r, conf := newRepo(t)
	points, want := chain(t, r, testVolume, 3, 2<<20)
	ctx := t.Context()
	reader := openRepo(t, conf)
	l, err := AcquireLease(ctx, reader, points[0], "serve")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{points[0].ID}, Cluster: testVolume.Cluster}); !errors.Is(err, ErrLeased) {
		t.Errorf("forget: %v", err)
	}
	plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"})
	if err != nil {
		t.Fatal(err)
	}
	if gone := plan.Removed(); len(gone) != 1 || gone[0].ID != points[1].ID {
		t.Errorf("removed %v", gone)
	}
	maintainNow(t, r)
	if !bytes.Equal(readPoint(t, reader, points[0]), want[0]) {
		t.Error("the leased point reads back different")
	}
	if err := l.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if plan, err = Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"}); err != nil || len(plan.Removed()) != 1 {
		t.Errorf("prune after the lease: %v, %v", plan, err)
	}
	if _, err := AcquireLease(ctx, reader, points[0], "serve"); !errors.Is(err, ErrNoSuchPoint) {
		t.Errorf("lease on a deleted point: %v", err)
	}
	if held, err := Leases(ctx, r); err != nil || len(held) != 0 {
		t.Errorf("leases %v, %v", held, err)
	}
}

// Storage that does not answer any more keeps nobody from ending: the lease runs out by itself.
// TestLeaseOfAClockThatIsBehind: a reader whose clock is two days behind holds the point by
// everybody else's clock, too.
func TestLeaseOfAClockThatIsBehind(t *testing.T) {
	r, conf := newRepo(t)
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: make([]byte, 100_000)}})
	behind := openWith(t, repository.OpenOptions{
		ConfigFile: conf, Password: "secret", Now: func() time.Time { return time.Now().Add(-48 * time.Hour) },
	})
	lease, err := AcquireLease(t.Context(), behind, p, "a test")
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close(t.Context())
	if ahead := behind.StorageAhead(); ahead < 47*time.Hour || ahead > 49*time.Hour {
		t.Errorf("the storage's clock is ahead by %v", ahead)
	}
	if r.StorageAhead() != 0 {
		t.Errorf("a right clock is %v behind", r.StorageAhead())
	}
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	held, err := leasesOn(t.Context(), r, p.ID)
	if err != nil || len(held) != 1 {
		t.Fatalf("%d leases, %v", len(held), err)
	}
	held[0].Host = "another" // of which only time tells
	if left := time.Until(held[0].Expires); left < leaseTime/2 || held[0].over(time.Now()) {
		t.Errorf("the lease expires in %v", left)
	}
}

func TestLeaseIsGivenUp(t *testing.T) {
	conf, f := repotest.New(t).ConnectFaulty(t)
	open := func() *repository.Repository {
		return openWith(t, repository.OpenOptions{ConfigFile: conf, Password: repotest.Password, Grace: 10 * time.Millisecond})
	}
	r := open()
	points, _ := chain(t, r, testVolume, 1, 1<<20)
	l, err := AcquireLease(t.Context(), r, points[0], "restore")
	if err != nil {
		t.Fatal(err)
	}
	f.Add(repotest.Fault{Op: repotest.Put, Hold: make(chan struct{})})
	ended, cancel := context.WithCancel(t.Context()) // as after Ctrl-C
	cancel()
	if err := l.release(ended, 10*time.Millisecond); err == nil {
		t.Error("a lease on storage that hangs was given back")
	}
	f.Clear()
	if held, err := Leases(t.Context(), open()); err != nil || len(held[points[0].ID]) != 1 {
		t.Errorf("leases %v, %v", held, err)
	}
	if err := l.Close(ended); err != nil {
		t.Errorf("once the storage is back: %v", err)
	}
	if held, err := Leases(t.Context(), open()); err != nil || len(held) != 0 {
		t.Errorf("leases %v, %v", held, err)
	}
}

// TestLeaseDuringPrune takes a lease after the points were deleted and before
// the prune looked for leases again: the point is put back.
func TestLeaseDuringPrune(t *testing.T) {
	r, conf := newRepo(t)
	points, want := chain(t, r, testVolume, 2, 2<<20)
	ctx := t.Context()
	reader := openRepo(t, conf)
	var l *Lease
	plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", step: func(s string) {
		if s != "deleted" {
			return
		}
		var err error
		if l, err = acquire(ctx, reader, points[0].ID, "serve"); err != nil {
			t.Error(err)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Spared) != 1 || len(plan.Removed()) != 0 {
		t.Errorf("spared %v, removed %v", plan.Spared, plan.Removed())
	}
	maintainNow(t, r)
	p := mustList(t, reader).ByID(points[0].ID)
	if p == nil || !bytes.Equal(readPoint(t, reader, p), want[0]) {
		t.Error("the point is not there any more")
	}
	if err := l.Close(context.WithoutCancel(ctx)); err != nil {
		t.Error(err)
	}
}

func TestPins(t *testing.T) {
	r, _ := newRepo(t)
	points, _ := chain(t, r, testVolume, 2, 1<<20)
	ctx := t.Context()
	p, err := Pin(ctx, r, testVolume.Cluster, points[0].ID, []string{"audit"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Pins) != 1 || p.ID != points[0].ID {
		t.Errorf("pins %v", p.Pins)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{p.ID}, Cluster: testVolume.Cluster}); !errors.Is(err, ErrPinned) {
		t.Errorf("forget: %v", err)
	}
	plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test"})
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Removed()) != 0 {
		t.Errorf("removed %v", plan.Removed())
	}
	if _, err := Pin(ctx, r, testVolume.Cluster, p.ID, nil, []string{"audit"}); err != nil {
		t.Fatal(err)
	}
	if _, err := Forget(ctx, r, ForgetOptions{Names: []string{p.ID}, Cluster: testVolume.Cluster}); err != nil {
		t.Error(err)
	}
}

// An owner's pins follow what it wants, and leave those of others alone.
func TestOwnedPins(t *testing.T) {
	r, _ := newRepo(t)
	points, _ := chain(t, r, testVolume, 3, 1<<20)
	ctx := t.Context()
	if _, err := Pin(ctx, r, "test", points[0].ID, []string{"audit"}, nil); err != nil {
		t.Fatal(err)
	}
	var held []string
	for _, step := range []struct {
		name string
		want map[string]string
		pins [2][]string // of the first two points
		lost int
	}{
		{"two", map[string]string{points[0].ID: "case 7", points[1].ID[:8]: ""}, [2][]string{{"audit", "prod/store: case 7"}, {"prod/store"}}, 0},
		{"again", map[string]string{points[0].ID: "case 7", points[1].ID[:8]: ""}, [2][]string{{"audit", "prod/store: case 7"}, {"prod/store"}}, 0},
		{"another reason", map[string]string{points[0].ID: "case 8", points[1].ID: ""}, [2][]string{{"audit", "prod/store: case 8"}, {"prod/store"}}, 0},
		{"one taken back", map[string]string{points[1].ID: ""}, [2][]string{{"audit"}, {"prod/store"}}, 0},
		{"one that is not there", map[string]string{points[1].ID: "", "ffffffff": ""}, [2][]string{{"audit"}, {"prod/store"}}, 1},
		{"none", nil, [2][]string{{"audit"}, nil}, 0},
	} {
		var missing map[string]error
		var err error
		held, missing, err = OwnedPins{Owner: "prod/store", Want: step.want, Held: held}.Apply(ctx, r)
		if err != nil || len(missing) != step.lost || len(held) != len(step.want)-step.lost {
			t.Fatalf("%s: held %v, missing %v, %v", step.name, held, missing, err)
		}
		cat, err := List(ctx, r, ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range step.pins {
			got := slices.Clone(cat.ByID(points[i].ID).Pins)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%s: point %d has pins %q, want %q", step.name, i, got, want)
			}
		}
		plan, err := Prune(ctx, r, PruneOptions{Policy: Policy{Latest: 1}, Cluster: "test", DryRun: true})
		if err != nil {
			t.Fatal(err)
		}
		pinned := 0
		for _, want := range step.pins {
			if len(want) > 0 {
				pinned++
			}
		}
		if got := len(plan.Removed()); got != 2-pinned {
			t.Errorf("%s: prune would remove %d points with %d pinned", step.name, got, pinned)
		}
	}
}

// TestOneMaintenanceAtATime starts a second run, from another connection with a
// configuration file and so a local lock of its own, inside the first.
func TestOneMaintenanceAtATime(t *testing.T) {
	r, conf := newRepo(t)
	chain(t, r, testVolume, 1, 100_000)
	other := openFresh(t, conf)
	met := false
	_, err := Maintain(t.Context(), r, MaintainOptions{Mode: repository.MaintenanceFull, step: func(s string) {
		if s != "marked" {
			return
		}
		met = true
		res, err := Maintain(t.Context(), other, MaintainOptions{Mode: repository.MaintenanceFull})
		if err != nil || !res.Busy {
			t.Errorf("the second run: %+v, %v", *res.MaintenanceReport, err)
		}
	}})
	if err != nil || !met {
		t.Fatalf("the first run: %v", err)
	}
	if res, err := Maintain(t.Context(), other, MaintainOptions{Mode: repository.MaintenanceQuick}); err != nil || res.Busy || res.Mode != repository.MaintenanceQuick {
		t.Errorf("afterwards: %+v, %v", *res.MaintenanceReport, err)
	}
}

// TestDeadRunsAreCleared removes what a killed run left and keeps what a living
// one holds.
func TestDeadRunsAreCleared(t *testing.T) {
	r, _ := newRepo(t)
	ctx := t.Context()
	chain(t, r, testVolume, 1, 300_000)
	w, err := r.NewWriter(ctx, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	id, err := w.WriteBlock(ctx, bytes.Repeat([]byte("left by a killed run"), 5000))
	if err != nil {
		t.Fatal(err)
	}
	host, _ := os.Hostname()
	self, ended := strconv.Itoa(os.Getpid()), strconv.Itoa(endedProcess(t))
	for _, tags := range []map[string]string{
		{tagRunHost: host, tagRunBoot: bootID(), tagRunPID: ended},
		{tagRunHost: host, tagRunBoot: bootID(), tagRunPID: self, tagRunStart: "1"}, // another process had our PID
		// These live, or may.
		{tagRunHost: host, tagRunBoot: bootID(), tagRunPID: self, tagRunStart: processStart(os.Getpid())},
		{tagRunHost: host, tagRunBoot: "another boot, container or machine of the name", tagRunPID: ended},
		{tagRunHost: "another host", tagRunBoot: bootID(), tagRunPID: ended},
	} {
		s := &repository.Snapshot{Source: testVolume.source(), Start: r.Now(), End: r.Now(), Incomplete: incompleteReason, Tags: tags}
		files := []repository.File{{Name: blocktree.DiskFile, Size: 100_000, ModTime: r.Now(), Mode: 0o600, Object: id}}
		if err := w.SaveSnapshot(ctx, s, files); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	res := maintainNow(t, r)
	if res.DeadRuns != 2 {
		t.Errorf("%d dead runs were cleared", res.DeadRuns)
	}
	if n := len(mustList(t, r).Incomplete()); n != 3 {
		t.Errorf("%d incomplete manifests are left", n)
	}
	if st, err := r.StateOf(ctx, id); err != nil || !st.Found || st.Deleted {
		t.Errorf("what a living run holds: %+v, %v", st, err)
	}
}

// endedProcess returns the PID of a process that was there and is not any more.
func endedProcess(t *testing.T) int {
	t.Helper()
	c := exec.CommandContext(t.Context(), "true")
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	return c.Process.Pid
}

// A lease is over with its process, not with another one that has its PID.
func TestLeaseIsOver(t *testing.T) {
	t.Parallel()
	host, _ := os.Hostname()
	now := time.Now()
	self, began := os.Getpid(), processStart(os.Getpid())
	if began == "" {
		t.Fatal("this process has no start")
	}
	for _, tc := range []struct {
		name    string
		lease   LeaseInfo
		expired time.Duration
		over    bool
	}{
		{"held", LeaseInfo{Host: host, Boot: bootID(), PID: self, Started: began}, -time.Minute, false},
		{"held by a process that stood still", LeaseInfo{Host: host, Boot: bootID(), PID: self, Started: began}, 100 * time.Hour, false},
		{"of a process that ended", LeaseInfo{Host: host, Boot: bootID(), PID: endedProcess(t)}, -time.Minute, true},
		{"of an earlier process of the PID", LeaseInfo{Host: host, Boot: bootID(), PID: self, Started: "1"}, -time.Minute, true},
		{"of another boot", LeaseInfo{Host: host, Boot: "another", PID: self, Started: began}, time.Hour, false},
		{"of another boot, long ago", LeaseInfo{Host: host, Boot: "another", PID: self, Started: began}, leaseSkew + time.Hour, true},
		{"of another host", LeaseInfo{Host: "another", Boot: bootID(), PID: endedProcess(t)}, time.Hour, false},
	} {
		tc.lease.Expires = now.Add(-tc.expired)
		if got := tc.lease.over(now); got != tc.over {
			t.Errorf("%s: over is %v", tc.name, got)
		}
	}
}

// TestKilledWritesAreCleared leaves files as a process does that is killed while it
// writes a blob: a full maintenance deletes the old ones, which no process can be
// at any more, and nothing else.
func TestKilledWritesAreCleared(t *testing.T) {
	t.Parallel()
	r, conf := newRepo(t)
	points, want := chain(t, r, testVolume, 2, 1<<20)
	pack := packFiles(t, conf, "p")[0]
	old, young, other := pack+".tmp.0123456789abcdef", pack+".tmp.fedcba9876543210", filepath.Join(filepath.Dir(pack), "notes.tmp.txt")
	past := time.Now().Add(-25 * time.Hour)
	for _, path := range []string{old, young, other} {
		if err := os.WriteFile(path, make([]byte, 1000), 0o600); err != nil {
			t.Fatal(err)
		}
		if path == young {
			continue
		}
		if err := os.Chtimes(path, past, past); err != nil {
			t.Fatal(err)
		}
	}
	res := maintainNow(t, r)
	if res.Temporary != (repository.Amount{Count: 1, Bytes: 1000}) {
		t.Errorf("%+v", res.Temporary)
	}
	for path, stays := range map[string]bool{old: false, young: true, other: true} {
		if _, err := os.Stat(path); (err == nil) != stays {
			t.Errorf("%s: %v", filepath.Base(path), err)
		}
	}
	if !bytes.Equal(readPoint(t, openFresh(t, conf), points[1]), want[1]) {
		t.Error("reads back different")
	}
}

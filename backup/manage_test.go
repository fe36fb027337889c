package backup

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/process"
)

// chain makes n points of one volume, the first of size random bytes, each next
// with a few thousand of them changed, and returns what each holds.
func chain(t *testing.T, r *repository.Repository, v points.Volume, n, size int) (pts []*points.Point, want [][]byte) {
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
		pts, want = append(pts, p), append(want, snap)
	}
	return pts, want
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

func mustList(t *testing.T, r *repository.Repository) *points.Catalog {
	t.Helper()
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	cat, err := points.List(t.Context(), r, points.ListOptions{})
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
	pts, want := chain(t, r, testVolume, 4, 6<<20)
	other := points.Volume{Namespace: "shop", Name: "big", Cluster: "test"}
	big, _ := chain(t, r, other, 1, 8<<20)
	before := packBytes(t, conf)
	if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{"shop/big@latest", pts[0].ID, pts[2].Name()}, Cluster: testVolume.Cluster}); err != nil {
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
		if !bytes.Equal(readPoint(t, fresh, pts[i]), want[i]) {
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
	pts, _ := chain(t, r, testVolume, 2, 4<<20)
	before := len(packFiles(t, conf, "p"))
	if _, err := Forget(t.Context(), r, ForgetOptions{Names: []string{pts[0].ID}, Cluster: testVolume.Cluster}); err != nil {
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
	pts, want := chain(t, r, testVolume, 2, 4<<20)
	third, _ := chain(t, r, points.Volume{Namespace: "shop", Name: "bad", Cluster: "test"}, 1, 3<<20)
	gone, _ := chain(t, r, points.Volume{Namespace: "shop", Name: "gone", Cluster: "test"}, 1, 5<<20)
	// Corrupt only the index of the third point in the pack.
	ctx := t.Context()
	root, err := points.OpenRoot(ctx, r, third[0])
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
	for i, p := range pts {
		if !bytes.Equal(readPoint(t, r2, p), want[i]) {
			t.Errorf("point %d reads back different", i)
		}
	}
	rep, err := Verify(ctx, r2, VerifyOptions{})
	if !errors.Is(err, points.ErrDamaged) {
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

// openFresh opens the repository of conf with new caches.
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

// TestOneMaintenanceAtATime starts a second run, from another connection with its own
// configuration file and so local lock, inside the first.
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

// endedProcess returns the PID of a process that has ended.
func endedProcess(t *testing.T) int {
	t.Helper()
	c := exec.CommandContext(t.Context(), "true")
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	return c.Process.Pid
}

// TestDeadRunsAreCleared removes what a killed run left and keeps what a live one holds.
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
		{tagRunHost: host, tagRunBoot: process.BootID(), points.TagRunPID: ended},
		{tagRunHost: host, tagRunBoot: process.BootID(), points.TagRunPID: self, tagRunStart: "1"}, // another process had our PID
		// These are alive, or may be.
		{tagRunHost: host, tagRunBoot: process.BootID(), points.TagRunPID: self, tagRunStart: process.Start(os.Getpid())},
		{tagRunHost: host, tagRunBoot: "another boot, container or machine of the name", points.TagRunPID: ended},
		{tagRunHost: "another host", tagRunBoot: process.BootID(), points.TagRunPID: ended},
	} {
		s := &repository.Snapshot{Source: testVolume.Source(), Start: r.Now(), End: r.Now(), Incomplete: incompleteReason, Tags: tags}
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

// TestKilledWritesAreCleared leaves the files of a process killed while it wrote a blob: a
// full maintenance deletes the old ones, which no live process can be writing, and nothing
// else.
func TestKilledWritesAreCleared(t *testing.T) {
	t.Parallel()
	r, conf := newRepo(t)
	pts, want := chain(t, r, testVolume, 2, 1<<20)
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
	if !bytes.Equal(readPoint(t, openFresh(t, conf), pts[1]), want[1]) {
		t.Error("reads back different")
	}
}

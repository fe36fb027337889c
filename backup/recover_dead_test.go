package backup

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestRunsGoOnFromPacks: the storage fails at data packs of a backup, so that uploaded
// packs are in no index, and the backup is run again. All points are intact, and after
// maintenance the repository is hardly larger than one where nothing failed.
func TestRunsGoOnFromPacks(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(61, 62))
	first, second := randomBytes(rng, 45<<20), randomBytes(rng, 45<<20)
	// Without the checkpoints that a slow machine makes: each would end a pack early.
	one := Options{Volume: testVolume, Disk: &memDisk{data: first}, Workers: 2, CheckpointEvery: time.Hour, protectAfter: time.Hour}
	two := one
	two.Disk = &memDisk{data: second}
	clean := repotest.New(t)
	r := clean.Open(t)
	mustBackup(t, r, one)
	maintainNow(t, r)
	base := clean.Size(t)
	mustBackup(t, r, two)
	maintainNow(t, r)
	full := clean.Size(t)

	s := repotest.New(t)
	faulty, f := s.OpenFaulty(t)
	point, _ := mustBackup(t, faulty, one)
	for _, skip := range []int{0, 1, 1, 0} { // packs that are uploaded before the storage fails
		f.Add(repotest.Fault{Op: repotest.Put, Prefix: "p", Skip: skip})
		if _, _, err := Run(t.Context(), faulty, two); err == nil {
			t.Fatal("the storage did not fail")
		}
		f.Clear()
		if !faulty.HasDead() {
			t.Error("no dead session after a run that failed")
		}
	}
	last, rec := mustBackup(t, faulty, two)
	if rec.Stats.Uploaded > 10<<20 { // two packs of 20 MiB were uploaded before
		t.Errorf("%d bytes were uploaded again", rec.Stats.Uploaded)
	}
	maintainNow(t, faulty)
	if faulty.HasDead() {
		t.Error("a dead session is left")
	}
	for p, want := range map[*points.Point][]byte{point: first, last: second} {
		if !bytes.Equal(readPoint(t, s.Open(t), p), want) {
			t.Errorf("%s reads back different", p.Name())
		}
	}
	if got, most := s.Size(t), full+(full-base)*15/100; got > most {
		t.Errorf("the repository takes %d bytes, more than %d", got, most)
	}
}

// TestMaintenanceLeavesLivingSession runs maintenance without safety margins on the same
// machine while a backup has packs uploaded that are in no index.
func TestMaintenanceLeavesLivingSession(t *testing.T) {
	t.Parallel()
	s := repotest.New(t)
	r, other := s.Open(t), s.Open(t)
	data := randomBytes(rand.New(rand.NewPCG(63, 64)), 45<<20)
	opt := Options{Volume: testVolume, Disk: &memDisk{data: data}, Workers: 2}
	ran := false
	opt.step = func(step string) {
		if step != "stored" {
			return
		}
		ran = true
		if len(s.Packs(t)) < 2 {
			t.Errorf("packs %v", s.Packs(t))
		}
		res, err := Maintain(t.Context(), other, MaintainOptions{Mode: "full", NoSafety: true})
		if err != nil || res.Killed.Sessions > 0 {
			t.Errorf("maintenance: %+v, %v", res, err)
		}
	}
	p, rec := mustBackup(t, r, opt)
	if !ran || rec.Stats.Uploaded > 50<<20 {
		t.Errorf("maintenance ran: %v, %d bytes were uploaded", ran, rec.Stats.Uploaded)
	}
	if !bytes.Equal(readPoint(t, s.Open(t), p), data) {
		t.Error("reads back different")
	}
}

// TestManifestsOfDeadSessions: manifests of a session that ended in the middle of its flush
// stay unknown, since they may be of an old view, and are not mistaken for those of a lost
// index.
func TestManifestsOfDeadSessions(t *testing.T) {
	t.Parallel()
	s := repotest.New(t)
	r, f := s.OpenFaulty(t)
	w, err := r.NewWriter(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.PutRecord(t.Context(), "half", nil, "text"); err != nil {
		t.Fatal(err)
	}
	before := s.Packs(t)
	f.Add(repotest.Fault{Op: repotest.Put, Prefix: "x"})
	if err := w.Flush(t.Context()); err == nil {
		t.Fatal("the storage did not fail")
	}
	f.Clear()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dead := slices.DeleteFunc(s.Packs(t), func(p string) bool { return slices.Contains(before, p) })
	if len(dead) != 1 || !r.HasDead() {
		t.Fatalf("packs %v, dead: %v", dead, r.HasDead())
	}
	mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: make([]byte, 1<<20)}})
	if r.HasDead() {
		t.Error("a dead session is left")
	}
	if recs, err := s.Open(t).ListRecords(t.Context(), "half", nil); err != nil || len(recs) > 0 {
		t.Errorf("records %v, %v", recs, err)
	}
	for _, when := range []string{"with the pack of the dead session", "after maintenance"} {
		rep, err := Verify(t.Context(), s.Open(t), VerifyOptions{})
		if err != nil || len(rep.Unknown) > 0 {
			t.Errorf("%s: packs of a lost index %v, %v", when, rep.Unknown, err)
		}
		maintainNow(t, r)
	}
	if slices.Contains(s.Packs(t), dead[0]) {
		t.Error("the pack of the dead session is left")
	}
}

func TestCheckpointDue(t *testing.T) {
	const every = time.Minute
	for _, row := range []struct {
		name               string
		last               checkpointed
		since              time.Duration
		contents, uploaded int64
		want               bool
	}{
		{"nothing was done", checkpointed{}, time.Second, 1, 1, false},
		{"time", checkpointed{}, every, 0, 0, true},
		{"contents", checkpointed{}, time.Second, checkpointContents, 0, true},
		{"bytes", checkpointed{uploaded: 1 << 30}, checkpointApart, 1, 1<<30 + checkpointBytes, true},
		{"bytes of before", checkpointed{uploaded: 1 << 30}, checkpointApart, 1, 1 << 30, false},
		{"bytes too soon", checkpointed{}, checkpointApart - 1, 1, 10 * checkpointBytes, false},
		{"the last took long", checkpointed{took: 2 * time.Second}, 39 * time.Second, 1, checkpointBytes, false},
		{"the last took long, a while ago", checkpointed{took: 2 * time.Second}, 40 * time.Second, 1, checkpointBytes, true},
	} {
		if got := row.last.due(row.since, every, row.contents, row.uploaded); got != row.want {
			t.Errorf("%s: due is %v", row.name, got)
		}
	}
}

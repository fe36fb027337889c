package kopia

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/internal/mounttest"
)

// kopiaSnapshot is a part of the output of "kopia snapshot list --json".
type kopiaSnapshot struct {
	ID     string `json:"id"`
	Source struct {
		Host     string `json:"host"`
		UserName string `json:"userName"`
		Path     string `json:"path"`
	} `json:"source"`
	Description string `json:"description"`
	RootEntry   struct {
		Obj string `json:"obj"`
	} `json:"rootEntry"`
	Pins []string `json:"pins"`
}

func (s *site) snapshots() []kopiaSnapshot {
	s.t.Helper()
	var out []kopiaSnapshot
	if err := json.Unmarshal(s.kopia("snapshot", "list", "--all", "--json"), &out); err != nil {
		s.t.Fatal(err)
	}
	return out
}

// TestStockKopiaKeepsRecoveryPoints runs each command of stock Kopia that
// reads, checks, moves or collects on a repository with a chain of points, and
// after each takes one more increment, reads all points as verify does, and compares
// the bytes of the oldest and the newest ones. At the end it compares those of all.
func TestStockKopiaKeepsRecoveryPoints(t *testing.T) {
	s := newSite(t)
	s.varve("repo", "create", "filesystem", "--path", s.repo)
	d := newDisk(t, s.dir, 66<<20+4321) // into a second segment
	points := map[string][]byte{}       // by ID
	names := map[string]string{}
	var ids []string
	backup := func() {
		t.Helper()
		p := s.backup(d.path, "shop/db")
		ids = append(ids, p.ID)
		points[p.ID], names[p.ID] = bytes.Clone(d.data), p.Name
		d.scribble(300_000)
		d.save()
	}
	for range 3 {
		backup()
	}
	s.connectKopia()

	steps := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"restore", func(t *testing.T) {
			for _, sn := range s.snapshots() {
				dir := filepath.Join(s.dir, "stock")
				s.kopia("snapshot", "restore", sn.RootEntry.Obj, dir)
				got, err := os.ReadFile(filepath.Join(dir, "disk.img"))
				if err != nil {
					t.Fatal(err)
				}
				id := strings.TrimPrefix(sn.Description, "Varve recovery point ")
				s.equal("stock restore of "+names[id], got, points[id])
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"verify", func(*testing.T) { s.kopia("snapshot", "verify", "--verify-files-percent=100") }},
		{"fix", func(t *testing.T) {
			before := s.snapshots()
			s.kopia("snapshot", "fix", "invalid-files", "--verify-files-percent=100", "--commit")
			if after := s.snapshots(); !sameSnapshots(before, after) {
				t.Errorf("kopia snapshot fix changed something:\n%v\n%v", before, after)
			}
		}},
		{"expire", func(t *testing.T) {
			before := len(s.snapshots())
			s.kopia("snapshot", "expire", "--all", "--delete")
			if after := len(s.snapshots()); after != before {
				t.Errorf("kopia snapshot expire left %d of %d points", after, before)
			}
		}},
		{"pin", func(t *testing.T) {
			id := s.snapshots()[0].ID
			s.kopia("snapshot", "pin", id, "--add=keep")
			if slices.ContainsFunc(s.snapshots(), func(sn kopiaSnapshot) bool { return sn.ID == id }) {
				t.Log("the pinned snapshot kept its manifest ID")
			}
		}},
		{"maintenance", func(*testing.T) { s.kopia("maintenance", "run", "--full", "--safety=none") }},
		{"mount", func(t *testing.T) { s.checkMount(t, points) }},
		{"sync-to", func(t *testing.T) { s.checkCopy(t, names, points) }},
		{"migrate", func(t *testing.T) { s.checkMigrated(t, names, points) }},
		{"maintenance again", func(*testing.T) { s.kopia("maintenance", "run", "--full", "--safety=none") }},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			step.run(t)
			backup()
			s.varve("verify", "--read", "100%", "--no-progress")
			for _, id := range []string{ids[0], ids[len(ids)-2], ids[len(ids)-1]} {
				s.equal("after "+step.name+": "+names[id], s.restored(id), points[id])
			}
		})
	}
	for _, id := range ids {
		s.equal("at the end: "+names[id], s.restored(id), points[id])
	}
}

func sameSnapshots(a, b []kopiaSnapshot) bool {
	key := func(list []kopiaSnapshot) []string {
		var out []string
		for _, sn := range list {
			out = append(out, sn.ID+" "+sn.RootEntry.Obj)
		}
		slices.Sort(out)
		return out
	}
	return slices.Equal(key(a), key(b))
}

func (s *site) checkMount(t *testing.T, points map[string][]byte) {
	sn := s.snapshots()[0]
	dir := filepath.Join(s.dir, "mnt")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := s.command(kopiaBin, "--config-file="+s.kopiaConfig(), "mount", sn.RootEntry.Obj, dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	mounted := func() bool {
		b, _ := os.ReadFile("/proc/self/mounts")
		return strings.Contains(string(b), " "+dir+" ")
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	for !mounted() { // polled, since a mount gives no signal
		select {
		case err := <-exited:
			t.Fatalf("kopia mount ended: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	got, err := os.ReadFile(filepath.Join(dir, "disk.img"))
	mounttest.Unmount(t, dir)
	<-exited
	if err != nil {
		t.Fatal(err)
	}
	s.equal("stock mount", got, points[strings.TrimPrefix(sn.Description, "Varve recovery point ")])
}

// checkCopy copies the repository with sync-to and reads the copy with Varve.
func (s *site) checkCopy(t *testing.T, names map[string]string, points map[string][]byte) {
	copied := filepath.Join(s.dir, "copy")
	if err := os.MkdirAll(copied, 0o700); err != nil {
		t.Fatal(err)
	}
	s.kopia("repository", "sync-to", "filesystem", "--path="+copied, "--delete")
	conf := filepath.Join(s.dir, "copy.config")
	s.varve("--config", conf, "repo", "connect", "filesystem", "--path", copied)
	s.readAll(t, conf, names, points)
}

// checkMigrated moves the points to a repository that stock Kopia made; this loses their
// tags.
func (s *site) checkMigrated(t *testing.T, names map[string]string, points map[string][]byte) {
	other := *s
	other.dir = filepath.Join(s.dir, "migrated")
	if err := os.MkdirAll(other.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	repo := filepath.Join(other.dir, "repo")
	if err := os.MkdirAll(repo, 0o700); err != nil {
		t.Fatal(err)
	}
	other.kopia("repository", "create", "filesystem", "--path="+repo)
	other.kopia("snapshot", "migrate", "--source-config="+s.kopiaConfig(), "--all", "--no-policies")
	conf := filepath.Join(s.dir, "migrated.config")
	s.varve("--config", conf, "repo", "connect", "filesystem", "--path", repo)
	s.readAll(t, conf, names, points)
}

func (s *site) readAll(t *testing.T, conf string, names map[string]string, points map[string][]byte) {
	t.Helper()
	for id, want := range points {
		target := filepath.Join(s.dir, "copy.img")
		s.varve("--config", conf, "restore", id, target, "--no-progress")
		got, err := os.ReadFile(target)
		if err != nil {
			t.Fatal(err)
		}
		s.equal(names[id], got, want)
		if err := os.Remove(target); err != nil {
			t.Fatal(err)
		}
	}
}

// TestVarveReadsStockKopia restores disk images that stock Kopia saved, with
// its default splitter and a fixed one.
func TestVarveReadsStockKopia(t *testing.T) {
	for _, splitter := range []string{"DYNAMIC-4M-BUZHASH", "FIXED-1M", "FIXED-4M"} {
		t.Run(splitter, func(t *testing.T) {
			s := newSite(t)
			if err := os.MkdirAll(s.repo, 0o700); err != nil {
				t.Fatal(err)
			}
			d := newDisk(t, s.dir, 70<<20+77)
			s.kopia("repository", "create", "filesystem", "--path="+s.repo, "--object-splitter="+splitter)
			s.kopia("snapshot", "create", d.path)
			first := bytes.Clone(d.data)
			d.scribble(500_000)
			d.save()
			s.kopia("snapshot", "create", d.path)
			s.varve("repo", "connect", "filesystem", "--path", s.repo)
			snaps := s.snapshots()
			if len(snaps) != 2 {
				t.Fatalf("%d snapshots", len(snaps))
			}
			s.equal("first", s.restored(snaps[0].ID), first)
			s.equal("second", s.restored(snaps[1].ID), d.data)
			if out, err := s.command(varveBin, "backup", d.path, "--volume", "a/b").CombinedOutput(); err == nil {
				t.Errorf("a repository of stock Kopia was written to:\n%s", out)
			}
		})
	}
}

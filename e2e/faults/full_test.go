package faults

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRepositoryFull fills the file system of the repository during a backup.
func TestRepositoryFull(t *testing.T) {
	t.Parallel()
	needRoot(t)
	dir := mount(t, "-t", "tmpfs", "-o", "size=24m", "tmpfs")
	s := newSite(t, filepath.Join(dir, "repo"), 32<<20)
	s.scribble(0, 0)
	whole := s.data
	s.data = append(s.data[:8<<20:8<<20], make([]byte, 24<<20)...)
	s.scribble(0, 8) // saves it
	s.backup()
	s.data = whole
	s.scribble(0, 8)
	// Kopia retries a failed write for more than a minute.
	r := s.run("backup", s.disk, "--volume", volume)
	if r.code != 1 || !strings.Contains(r.stderr, "storage is full") || !strings.Contains(r.stderr, "varve prune") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	command(t, "mount", "-o", "remount,size=128m", dir)
	s.data = nil // a point of the run that failed would be wrong
	s.check()
	s.data = whole
	s.scribble(0, 8)
	s.backup()
	s.check()
	s.varve("maintenance", "run", "--full", "--safety=none")
	s.check()
	s.varve("verify", "--read", "100%")
}

// TestTargetFull fills the file system of a restore's target, and continues once there is
// room.
func TestTargetFull(t *testing.T) {
	t.Parallel()
	needRoot(t)
	s := newSite(t, "", 96<<20)
	p := s.backup()
	dir := mount(t, "-t", "tmpfs", "-o", "size=80m", "tmpfs")
	target := filepath.Join(dir, "disk.img")
	r := s.run("restore", p.ID, target)
	if r.code != 1 || !strings.Contains(r.stderr, "free some space") || !strings.Contains(r.stderr, target) {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if _, err := os.Stat(target); err != nil {
		t.Fatal(err)
	}
	written := allocated(t, target)
	command(t, "mount", "-o", "remount,size=128m", dir)
	var res struct{ Written, Resumed int64 }
	if err := json.Unmarshal([]byte(s.varve("restore", p.ID, target, "-o", "json")), &res); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes were on the target; %d were taken as done, %d written", written, res.Resumed, res.Written)
	if res.Resumed == 0 || written-res.Resumed > 64<<20 {
		t.Errorf("%d bytes of %d were resumed", res.Resumed, written)
	}
	s.sameFile(target)
}

package faults

import (
	"encoding/json"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// everything returns the size of all files of the repository, in bytes, and how many are
// half-written.
func (s *site) everything() (bytes int64, temporary int) {
	s.t.Helper()
	err := filepath.WalkDir(s.repo, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		bytes += info.Size()
		if strings.Contains(d.Name(), ".tmp.") {
			temporary++
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return bytes, temporary
}

// TestKillSlowWriter kills backups over a slow link long before their first checkpoint. Each
// continues from the packs of those before, and in the end the repository is hardly larger
// than one without kills.
func TestKillSlowWriter(t *testing.T) {
	t.Parallel()
	const size = 48 << 20
	args := func(s *site) []string { return []string{"backup", s.disk, "--volume", volume, "-o", "json"} }
	slow := func(s *site) {
		s.varve("repo", "disconnect")
		s.varve("repo", "connect", "filesystem", "--path", s.repo, "--max-upload-rate", "40MiB")
	}
	clean := newSite(t, "", size)
	slow(clean)
	empty, _ := clean.everything()
	r, work := clean.watch(-1, 0, args(clean)...)
	if r.code != 0 {
		t.Fatal(r.stderr)
	}
	clean.made(r.stdout)

	s := newSite(t, "", size)
	slow(s)
	hit := 0
	for runs := 0; runs < 6 || hit == 0; runs++ {
		if s.killed(sooner(work*8/10, runs-6+kills), args(s)...) {
			hit++
		}
	}
	killed, temporary := s.everything()
	packed := s.size() // without half-written files
	t.Logf("%d were killed before they were done; the repository takes %d bytes, %d files are half-written", hit, killed-empty, temporary)
	s.check()
	var last struct {
		Stats struct {
			Uploaded int64 `json:"uploaded"`
		} `json:"stats"`
	}
	points := int64(len(s.want)) // of runs that were killed at their end
	out := s.varve(args(s)...)
	s.made(out)
	if err := json.Unmarshal([]byte(out), &last); err != nil {
		t.Fatal(err)
	}
	after, temporary := s.everything()
	whole, _ := clean.everything()
	if after-empty > (whole-empty)*115/100+points<<20 {
		t.Errorf("before maintenance the repository takes %d bytes, %d without kills", after-empty, whole-empty)
	}
	t.Logf("the last run uploaded %d bytes; the repository takes %d", last.Stats.Uploaded, after-empty)
	if temporary > 0 {
		t.Errorf("%d half-written files are left", temporary)
	}
	// What was uploaded before is not uploaded again, except what each run packed last.
	if most := max(0, size-packed) + size/4; last.Stats.Uploaded > most {
		t.Errorf("the last run uploaded %d bytes, more than %d", last.Stats.Uploaded, most)
	}
	s.check()
	for _, of := range []*site{clean, s} {
		of.varve("maintenance", "run", "--full", "--safety=none")
	}
	want, _ := clean.everything()
	got, _ := s.everything()
	t.Logf("after maintenance the repository takes %.3f x of one without kills", float64(got)/float64(want))
	if got > want*115/100+points<<20 {
		t.Errorf("after maintenance the repository takes %d bytes, %d without kills", got, want)
	}
	s.check()

	// Without another backup, maintenance alone reclaims what killed runs left.
	s.scribble(0, size)
	for range 3 {
		s.killed(work*8/10, "backup", s.disk, "--volume", "shop/other")
	}
	s.varve("maintenance", "run", "--full", "--safety=none")
	if last, temporary := s.everything(); temporary > 0 || last > got+got/20+(2<<20) && len(s.ids()) == len(s.want) {
		t.Errorf("maintenance left %d bytes and %d half-written files, %d bytes before the kills", last, temporary, got)
	}
	s.check()
	s.varve("verify", "--read", "100%")
}

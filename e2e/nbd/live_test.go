package nbd

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A backup ends between the first and the second connection of a client of @latest: both
// read the same disk, and so does one that reconnects.
func TestAliasStaysOnOneDisk(t *testing.T) {
	s := newSite(t)
	srv := s.serve("--refresh", "50ms")
	if err := exec.Command("/usr/bin/python3", "-c", "import nbd").Run(); err != nil {
		t.Skip("Debian's Python has no module nbd: \"make setup\" installs python3-libnbd")
	}
	before := s.latest()
	data, err := os.ReadFile(before.want)
	if err != nil {
		t.Fatal(err)
	}
	copy(data, bytes.Repeat([]byte("another disk"), 1000))
	if err := os.WriteFile(s.path("next.img"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`
import subprocess
uri, image = %q, %q
want = open(image, "rb").read(65536)
h.connect_uri(uri)
assert h.pread(65536, 0) == want
subprocess.check_call([%q, "backup", "next.img", "--volume", "shop/db"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
def names():
    l = nbd.NBD(); l.set_opt_mode(True); l.connect_uri(%q)
    got = []
    l.opt_list(lambda n, d: got.append(n)); l.opt_abort()
    return got
while len(names()) < 4: pass
g = nbd.NBD(); g.connect_uri(uri)
assert g.pread(65536, 0) == want, "the second connection is on another disk"
h.shutdown(); g.shutdown()
r = nbd.NBD(); r.connect_uri(uri)
assert r.pread(65536, 0) == want, "the client that came back is on another disk"
`, srv.uri("shop/db@latest"), before.want, varveBin, srv.uri(""))
	s.run("nbdsh", "-c", script)
	// Under another name, it is found.
	s.has(s.varve("nbd", "list", srv.uri("")), s.latest().Name)
	s.run("nbdcopy", srv.uri("shop/db@latest~1"), s.path("copy"))
	s.same(s.path("copy"), before.want)
}

// Maintenance in another process rewrites and deletes every pack while fio reads and
// verifies a point: without an error.
func TestMaintenanceElsewhere(t *testing.T) {
	s := newSite(t)
	// fio verifies what it wrote itself: a disk with its pattern is backed up.
	pattern := s.path("pattern.img")
	s.run("fio", "--name=p", "--filename="+pattern, "--rw=write", "--bs=64k", "--size=32M", "--verify=crc32c", "--do_verify=0", "--end_fsync=1")
	p := s.backupAs("shop/pattern", pattern)
	srv := s.serve("--cache-size", "1M")
	before := s.packs()
	rounds := 0
	fio := s.command("fio", "--name=p", "--ioengine=nbd", "--uri="+srv.uri(p.Name), "--rw=read", "--bs=64k", "--size=32M",
		"--verify=crc32c", "--verify_only=0", "--do_verify=1", "--verify_fatal=1", "--iodepth=8", "--loops=3", "--rate=16m")
	var out bytes.Buffer
	fio.Stdout, fio.Stderr = &out, &out
	if err := fio.Start(); err != nil {
		t.Skipf("fio: %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- fio.Wait() }()
	for running := true; running; {
		select {
		case err := <-ended:
			running = false
			if err != nil {
				t.Errorf("fio: %v\n%s", err, out.String())
			}
		default:
			// Something to collect, so that packs are rewritten.
			s.varve("backup", s.points[rounds%3].want, "--volume", "shop/other", "--full")
			s.varve("forget", "shop/other@latest")
			s.varve("maintenance", "run", "--full", "--safety", "none")
			rounds++
		}
	}
	after, gone := s.packs(), 0
	for path := range before {
		if !after[path] {
			gone++
		}
	}
	t.Logf("%d rounds of maintenance deleted %d of the %d packs the server began with", rounds, gone, len(before))
	if gone == 0 {
		t.Error("maintenance deleted no pack: nothing was tested")
	}
	s.run("nbdcopy", srv.uri(p.Name), s.path("copy"))
	s.same(s.path("copy"), pattern)
}

// packs returns the files of the repository that hold blocks.
func (s *site) packs() map[string]bool {
	s.t.Helper()
	found := map[string]bool{}
	err := filepath.WalkDir(s.path("repo"), func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(s.path("repo"), path)
		if err == nil && !d.IsDir() && strings.HasPrefix(rel, "p") {
			found[path] = true
		}
		return nil // skip files that maintenance deletes
	})
	if err != nil || len(found) == 0 {
		s.t.Fatalf("packs of the repository: %d, %v", len(found), err)
	}
	return found
}

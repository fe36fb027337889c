package nbd

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// onePoint adds a point whose changed block, at 16 MiB, is in separate packs, and returns
// their files.
func (s *site) onePoint() (p point, packs []string) {
	s.t.Helper()
	file := s.path("extra.img")
	s.run("cp", s.latest().want, file)
	before := s.packs()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte("gone"), 4096), 16<<20); err != nil {
		s.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		s.t.Fatal(err)
	}
	p = s.backupFile(file)
	for path := range s.packs() {
		if !before[path] {
			packs = append(packs, path)
		}
	}
	if len(packs) == 0 {
		s.t.Fatal("the backup wrote no pack")
	}
	return p, packs
}

// A pack is lost, or its bytes change: reads of its blocks fail with EIO and a text that
// names point and block, and the connection stays open.
func TestBadBlocks(t *testing.T) {
	for _, c := range []struct {
		name, harm, text string
		flags            []string
	}{
		{"missing", "os.remove(path)", "missing", nil},
		{"corrupt", "b = open(path, 'rb').read(); open(path, 'wb').write(bytes(x ^ 0x55 for x in b))", "corrupt", nil},
		{"corrupt while hydrating", "b = open(path, 'rb').read(); open(path, 'wb').write(bytes(x ^ 0x55 for x in b))", "corrupt", []string{"--hydrate"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t)
			p, lost := s.onePoint()
			if err := exec.Command("/usr/bin/python3", "-c", "import nbd").Run(); err != nil {
				t.Skip("Debian's Python has no module nbd: \"make setup\" installs python3-libnbd")
			}
			// The damage is done after a look at the export, which reads its record, and
			// before the first client that stays, with which hydration begins.
			srv := s.serve(append([]string{"--refresh", "1h"}, c.flags...)...)
			s.run("nbdsh", "-c", fmt.Sprintf(`
import os
uri, want = %q, open(%q, "rb").read(1 << 20)
look = nbd.NBD(); look.set_opt_mode(True); look.connect_uri(uri); look.opt_info()
for path in %q.split("|"):
    %s
look.opt_abort()
h.connect_uri(uri)
for i in range(3):
    try:
        h.pread(4096, 16 << 20)
        raise SystemExit("a bad block was read")
    except nbd.Error as e:
        assert e.errno == "EIO", e.errno
    assert h.pread(1 << 20, 0) == want, "the connection does not go on"
    assert h.pread(4096, (16 << 20) - 4096) is not None
`, srv.uri(p.Name), p.want, strings.Join(lost, "|"), c.harm))
			_, stderr, err := s.try(varveBin, "nbd", "read", srv.uri(p.Name), "--offset", "16M", "--length", "4096")
			if err == nil {
				t.Fatal("a bad block was read")
			}
			s.has(stderr, p.Name, "block at 0x1000000", c.text)
			// Other points without the block read completely.
			s.run("nbdcopy", srv.uri(s.latest().Name), s.path("copy"))
			s.same(s.path("copy"), s.latest().want)
		})
	}
}

package nbd

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestNbdinfo(t *testing.T) {
	s := newSite(t)
	srv := s.serve()
	latest := srv.uri("shop/db@latest")
	s.has(s.run("nbdinfo", latest), s.latest().Name, "is_read_only: true", "can_multi_conn: true", "can_df: true",
		"can_cache: true", "qemu:allocation-depth", "qemu:dirty-bitmap:"+s.points[0].Name, fmt.Sprint("export-size: ", diskSize))
	list := s.run("nbdinfo", "--list", srv.uri(""))
	for _, p := range s.points {
		s.has(list, `export="`+p.Name+`"`, p.ID[:12])
	}
	var doc struct {
		Exports []struct {
			Name     string `json:"export-name"`
			Size     int64  `json:"export-size"`
			ReadOnly bool   `json:"is_read_only"`
		} `json:"exports"`
	}
	if err := json.Unmarshal([]byte(s.run("nbdinfo", "--json", latest)), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Exports) != 1 || doc.Exports[0].Size != diskSize || !doc.Exports[0].ReadOnly {
		t.Errorf("nbdinfo --json: %+v", doc)
	}
	s.has(s.run("nbdinfo", "--map", latest), "data", "hole,zero")
	s.has(s.run("nbdinfo", "--map=qemu:allocation-depth", latest), "local", "backing depth 2", "backing depth 3", "absent")
	s.has(s.run("nbdinfo", "--map=qemu:dirty-bitmap:"+s.points[0].Name, latest), "dirty", "clean")
	for _, is := range []string{"read-only", "tls"} {
		_, _, err := s.try("nbdinfo", "--is", is, latest)
		if (err == nil) != (is == "read-only") {
			t.Errorf("nbdinfo --is %s: %v", is, err)
		}
	}
	for can, want := range map[string]bool{"multi-conn": true, "cache": true, "df": true, "flush": false, "trim": false, "structured": true} {
		if _, _, err := s.try("nbdinfo", "--can", can, latest); (err == nil) != want {
			t.Errorf("nbdinfo --can %s: %v, want %v", can, err, want)
		}
	}
	if _, stderr, err := s.try("nbdinfo", srv.uri("shop/none@latest")); err == nil {
		t.Errorf("an unknown export was opened: %s", stderr)
	}
}

// Every point of the chain reads back unchanged, over several connections.
func TestNbdcopy(t *testing.T) {
	s := newSite(t)
	srv := s.serve("--cache-size", "8M") // far less than the disk
	for _, p := range s.points {
		s.run("nbdcopy", "--connections=4", srv.uri(p.Name), s.path("copy"))
		s.same(s.path("copy"), p.want)
	}
}

func TestNbdcopyOntoOverlay(t *testing.T) {
	s := newSite(t)
	srv := s.serve("--writable")
	first, last := s.points[0], s.latest()
	s.run("nbdcopy", "--connections=4", "--flush", last.want, srv.uri(first.Name))
	s.run("nbdcopy", srv.uri(first.Name), s.path("copy"))
	s.same(s.path("copy"), last.want)
	// And from one export onto another.
	s.run("nbdcopy", "--flush", srv.uri(last.Name), srv.uri(s.points[1].Name))
	s.run("nbdcopy", srv.uri(s.points[1].Name), s.path("copy"))
	s.same(s.path("copy"), last.want)
	srv.stop()
	s.varve("restore", first.Name, s.path("restored"))
	s.same(s.path("restored"), first.want)
}

func TestNbdsh(t *testing.T) {
	s := newSite(t)
	srv := s.serve("--writable")
	if err := exec.Command("/usr/bin/python3", "-c", "import nbd").Run(); err != nil {
		t.Skip("Debian's Python has no module nbd: \"make setup\" installs python3-libnbd")
	}
	script := `
h.connect_uri(uri)
want = open(image, "rb").read()
assert h.get_size() == len(want)
assert h.pread(65536, 4096) == want[4096:69632]
h.pwrite(b"x" * 5000, 777, nbd.CMD_FLAG_FUA)
h.trim(1 << 20, 2 << 20)
h.zero(1 << 20, 4 << 20)
h.flush()
assert h.pread(5002, 776) == want[776:777] + b"x" * 5000 + want[5777:5778]
assert h.pread(1 << 20, 2 << 20) == bytes(1 << 20)
assert h.pread(1 << 20, 4 << 20) == bytes(1 << 20)
# Many at once, answered in any order.
bufs = [(o, nbd.Buffer(4096)) for o in range(8 << 20, 12 << 20, 65536)]
cookies = [h.aio_pread(b, o) for o, b in bufs]
while h.aio_in_flight() > 0:
    h.poll(-1)
for c in cookies: assert h.aio_command_completed(c)
for o, b in bufs: assert b.to_bytearray() == want[o:o+4096]
try:
    h.set_strict_mode(0); h.pread(4096, len(want))
    raise SystemExit("read beyond the end")
except nbd.Error as e:
    assert e.errno == "EINVAL", e.errno
`
	s.run("nbdsh", "-c", fmt.Sprintf("uri = %q; image = %q", srv.uri("shop/db@latest"), s.latest().want), "-c", script)
}

func TestNbdfuse(t *testing.T) {
	s := newSite(t)
	srv := s.serve()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("no FUSE on this machine: %v", err)
	}
	if _, err := exec.LookPath("nbdfuse"); err != nil {
		t.Skip("nbdfuse is not installed: \"make setup\" installs it where Debian has it")
	}
	mnt := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(mnt, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	pid := s.path("nbdfuse.pid") // written once it is mounted
	cmd := s.command("nbdfuse", "-P", pid, "-r", mnt, srv.uri("shop/db@latest"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("fusermount3", "-u", mnt).Run()
		_ = cmd.Wait()
	})
	waitFor(t, func() bool { _, err := os.Stat(pid); return err == nil })
	s.same(mnt, s.latest().want)
}

// waitFor waits for what comes by itself, for minutes on a busy machine.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for tries := 0; !ok(); tries++ {
		if tries == 6000 {
			t.Fatal("it did not come in five minutes")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestQemuImg(t *testing.T) {
	s := newSite(t)
	srv := s.serve("--writable")
	latest := srv.uri("shop/db@latest")
	s.has(s.run("qemu-img", "info", "-f", "raw", latest), "48 MiB")
	s.has(s.run("qemu-img", "map", "--output=json", "-f", "raw", latest), `"zero": true`, `"data": true`)
	s.has(s.run("qemu-img", "compare", "-f", "raw", "-F", "raw", latest, s.latest().want), "identical")
	if out, _, err := s.try("qemu-img", "compare", "-f", "raw", "-F", "raw", srv.uri(s.points[0].Name), s.latest().want); err == nil {
		t.Errorf("two points are told to be the same: %s", out)
	}
	s.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", latest, s.path("copy.qcow2"))
	s.has(s.run("qemu-img", "compare", "-F", "raw", s.path("copy.qcow2"), s.latest().want), "identical")
	// What changed since a point, as qemu's backup tools request it.
	bitmap := fmt.Sprintf(`driver=nbd,server.type=unix,server.path=%s,export=%s,x-dirty-bitmap=qemu:dirty-bitmap:%s`,
		srv.socket, s.latest().Name, s.points[1].Name)
	s.has(s.run("qemu-img", "map", "--output=json", "--image-opts", bitmap), `"data": false`)
	// The other way, onto an overlay.
	s.run("qemu-img", "convert", "-n", "-O", "raw", s.path("copy.qcow2"), srv.uri(s.points[0].Name))
	s.has(s.run("qemu-img", "compare", "-f", "raw", "-F", "raw", srv.uri(s.points[0].Name), s.latest().want), "identical")
}

func TestQemuIO(t *testing.T) {
	s := newSite(t)
	srv := s.serve("--writable")
	out := s.run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 64k 128k", "-c", "write -f -P 0x5b 1M 4k", "-c", "write -z 96k 16k",
		"-c", "discard 128k 16k", "-c", "flush", "-c", "read -P 0x5a 64k 32k", "-c", "read -P 0 96k 16k", "-c", "read -P 0x5b 1M 4k",
		srv.uri("shop/db@latest"))
	if strings.Contains(out, "failed") || strings.Contains(out, "error") {
		t.Errorf("qemu-io:\n%s", out)
	}
}

// fio writes a pattern to an overlay and verifies it, with a small cache.
func TestFioVerify(t *testing.T) {
	s := newSite(t)
	srv := s.serve("--writable", "--cache-size", "8M")
	s.run("fio", "--name=verify", "--ioengine=nbd", "--uri="+srv.uri("shop/db@latest"), "--rw=randwrite", "--bsrange=512-64k",
		"--size=24M", "--iodepth=16", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randrepeat=1")
}

func TestNbdkitPlugin(t *testing.T) {
	s := newSite(t)
	srv := s.serve()
	sock := filepath.Join(t.TempDir(), "k")
	pid := s.path("nbdkit.pid") // written once it listens
	cmd := s.command("nbdkit", "-f", "-U", sock, "-P", pid, "--filter=cow", "--filter=readahead", "nbd", "uri="+srv.uri("shop/db@latest"))
	if _, err := exec.LookPath("nbdkit"); err != nil {
		t.Skip("nbdkit is not installed: \"make setup\" installs it")
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	waitFor(t, func() bool { _, err := os.Stat(pid); return err == nil })
	s.run("nbdcopy", "nbd+unix:///?socket="+sock, s.path("copy"))
	s.same(s.path("copy"), s.latest().want)
}

// libnbd starts the server itself: by socket activation, and on pipes.
func TestStartedByTheClient(t *testing.T) {
	s := newSite(t)
	s.run("nbdcopy", "--", "[", varveBin, "serve", "shop/db@latest", "]", s.path("copy"))
	s.same(s.path("copy"), s.latest().want)
	if err := exec.Command("/usr/bin/python3", "-c", "import nbd").Run(); err != nil {
		t.Skip("Debian's Python has no module nbd: \"make setup\" installs python3-libnbd")
	}
	s.run("nbdsh", "-c", fmt.Sprintf("h.connect_command([%q, 'serve', '--stdio', %q])\n", varveBin, s.points[0].Name)+
		fmt.Sprintf("assert h.pread(1 << 20, 0) == open(%q, 'rb').read(1 << 20)", s.points[0].want))
}

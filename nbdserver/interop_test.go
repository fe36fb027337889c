package nbdserver_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// tool returns the path of an external program, or skips the test.
func tool(t *testing.T, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed (Debian packages qemu-utils libnbd-bin python3-libnbd nbdkit fio)", name)
	}
	return p
}

// run runs a program and returns what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), nbdtest.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, tool(t, name), args...)
	// Debian's Python modules belong to Debian's Python.
	cmd.Env = append(os.Environ(), "PATH=/usr/bin:/bin:"+os.Getenv("PATH"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out.String())
	}
	return out.String()
}

// disks serves the image read-only as "ro", and writable as "rw".
func disks(t *testing.T) (uri func(export string) string, rw *nbdtest.Disk) {
	t.Helper()
	ro := nbdtest.NewDisk(nbdtest.Image())
	ro.Extra = map[string]func(int64) uint32{
		"qemu:allocation-depth":      func(b int64) uint32 { return 1 + uint32(b/256%2) },
		"qemu:dirty-bitmap:shop/db@": func(b int64) uint32 { return uint32(b / 16 % 2) },
	}
	rw = nbdtest.NewEmptyDisk(nbdtest.ImageSize)
	_, path := serve(t, nbdserver.Config{Catalog: nbdserver.NewStatic(
		nbdserver.Opened{Name: "ro", Description: "a recovery point", Export: ro.ReadOnly()},
		nbdserver.Opened{Name: "rw", Export: rw.Writable()},
	)})
	return func(export string) string { return "nbd+unix:///" + export + "?socket=" + path }, rw
}

func contains(t *testing.T, out string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("output lacks %q:\n%s", w, out)
		}
	}
}

func imageFile(t *testing.T) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(p, nbdtest.Image(), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func sameAsImage(t *testing.T, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(b, nbdtest.Image()) {
		t.Errorf("%s differs from the image: %d bytes, %v", file, len(b), err)
	}
}

func TestNbdinfo(t *testing.T) {
	uri, _ := disks(t)
	contains(t, run(t, "nbdinfo", uri("ro")), "structured packets", "a recovery point", "is_read_only: true",
		"can_multi_conn: true", "can_cache: true", "base:allocation", "qemu:dirty-bitmap:shop/db@", "qemu:allocation-depth")
	contains(t, run(t, "nbdinfo", "--json", uri("rw")), `"can_fast_zero": true`, `"can_flush": true`, `"can_fua": true`)
	contains(t, run(t, "nbdinfo", "--list", uri("")), `export="ro"`, `export="rw"`)
	run(t, "nbdinfo", "--is", "read-only", uri("ro"))
	run(t, "nbdinfo", "--can", "multi-conn", uri("ro"))
	run(t, "nbdinfo", "--can", "df", uri("ro"))
	contains(t, run(t, "nbdinfo", "--map", uri("ro")), "1048576", "hole,zero")
	contains(t, run(t, "nbdinfo", "--map=qemu:allocation-depth", uri("ro")), "local", "backing depth 2")
	contains(t, run(t, "nbdinfo", "--map=qemu:dirty-bitmap:shop/db@", uri("ro")), "dirty", "clean")
}

func TestNbdcopy(t *testing.T) {
	uri, _ := disks(t)
	out := filepath.Join(t.TempDir(), "out")
	run(t, "nbdcopy", "--connections=4", uri("ro"), out)
	sameAsImage(t, out)
	run(t, "nbdcopy", "--connections=4", "--flush", uri("ro"), uri("rw"))
	back := filepath.Join(t.TempDir(), "back")
	run(t, "nbdcopy", uri("rw"), back)
	sameAsImage(t, back)
}

func TestQemuImg(t *testing.T) {
	uri, _ := disks(t)
	contains(t, run(t, "qemu-img", "info", "-f", "raw", uri("ro")), "4 MiB")
	contains(t, run(t, "qemu-img", "map", "--output=json", "-f", "raw", uri("ro")), `"start": 1048576, "length": 1048576`)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri("ro"), imageFile(t))
	out := filepath.Join(t.TempDir(), "out.qcow2")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri("ro"), out)
	run(t, "qemu-img", "compare", out, imageFile(t))
	run(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", out, uri("rw"))
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri("rw"), imageFile(t))
}

func TestQemuIO(t *testing.T) {
	uri, rw := disks(t)
	out := run(t, "qemu-io", "-f", "raw", "-c", "write -P 0x5a 64k 128k", "-c", "write -z 96k 16k",
		"-c", "discard 128k 16k", "-c", "flush", "-c", "read -P 0x5a 64k 32k", "-c", "read -P 0 96k 16k", uri("rw"))
	if strings.Contains(out, "failed") {
		t.Errorf("qemu-io:\n%s", out)
	}
	if rw.Flushes.Load() == 0 {
		t.Error("flush did not reach the export")
	}
	if out := run(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0 1M 1M", uri("ro")); strings.Contains(out, "failed") {
		t.Errorf("qemu-io:\n%s", out)
	}
}

// needNbdsh skips without nbdsh and its Python module.
func needNbdsh(t *testing.T) {
	t.Helper()
	tool(t, "nbdsh")
	if err := exec.Command("/usr/bin/python3", "-c", "import nbd").Run(); err != nil {
		t.Skip("Debian's Python has no module nbd (package python3-libnbd)")
	}
}

func TestNbdsh(t *testing.T) {
	uri, _ := disks(t)
	needNbdsh(t)
	script := `
import nbd, errno
assert h.get_size() == 4 << 20
assert h.pread(16, 1 << 20) == bytearray(16)
assert h.is_read_only()
h.set_strict_mode(0)
for call in (lambda: h.pwrite(bytearray(512), 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)):
    try:
        call()
        assert False
    except nbd.Error as e:
        assert e.errnum == errno.EPERM, e
try:
    h.pread(1024, (4 << 20) - 512)
    assert False
except nbd.Error as e:
    assert e.errnum == errno.EINVAL, e
h.cache(1 << 20, 0)
chunks = []
h.pread_structured(262144, 2 << 20, lambda buf, off, st, err: chunks.append((off, len(buf), st)))
assert any(st == nbd.READ_HOLE for _, _, st in chunks), chunks
print("fine")
`
	contains(t, run(t, "nbdsh", "-u", uri("ro"), "-c", script), "fine")
}

func TestFio(t *testing.T) {
	uri, _ := disks(t)
	job := filepath.Join(t.TempDir(), "job.fio")
	if err := os.WriteFile(job, []byte(fmt.Sprintf(`[verify]
ioengine=nbd
uri=%s
rw=randwrite
bs=4k
size=2m
iodepth=16
verify=crc32c
do_verify=1
verify_state_save=0
fsync=32
`, uri("rw"))), 0o600); err != nil {
		t.Fatal(err)
	}
	contains(t, run(t, "fio", job), "err= 0")
}

// nbdkit's nbd plugin is a client; its filters read in ways of their own.
func TestNbdkitPlugin(t *testing.T) {
	uri, _ := disks(t)
	tool(t, "nbdkit")
	out := filepath.Join(t.TempDir(), "out")
	run(t, "nbdkit", "-U", "-", "--filter=cow", "--filter=blocksize", "--filter=readahead", "nbd", "uri="+uri("ro"),
		"minblock=4096", "--run", "nbdcopy $uri "+out)
	sameAsImage(t, out)
}

// TestSuiteAgainstPeers runs the conformance suite against other servers: a
// rule they break is a rule misread, or a deviation to write down here.
func TestSuiteAgainstPeers(t *testing.T) {
	t.Run("nbdkit", func(t *testing.T) {
		bin := tool(t, "nbdkit")
		for _, writable := range []bool{false, true} {
			t.Run(fmt.Sprintf("writable=%v", writable), func(t *testing.T) {
				traits := nbdtest.Traits{Writable: writable, AnyName: true, LeftOut: withoutExtendedHeaders(map[string]string{
					"context/set-ignores-wildcards": "nbdkit 1.32 selects a context twice that is asked for twice",
					"request/disconnect":            "nbdkit 1.32 answers ESHUTDOWN to requests it has not begun at DISC",
					"read/hole":                     "nbdkit 1.32 sends holes as data",
					"status/zeroes":                 "nbdkit's file plugin tells holes only, and the image's file has none",
					"write/fast-zero":               "nbdkit's file plugin has no fast zeroes",
					"write/status-follows":          "nbdkit's file plugin tells holes only",
				})}
				nbdtest.Run(t, traits, func(t *testing.T) nbdtest.Target {
					path := filepath.Join(t.TempDir(), "s")
					args := []string{"-f", "-U", path, "-P", path + ".pid", "file", imageFile(t)}
					if !writable {
						args = append([]string{"-r"}, args...)
					}
					start(t, bin, path+".pid", args...)
					return nbdtest.Target{Export: "", Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
				})
			})
		}
	})
	t.Run("qemu-nbd", func(t *testing.T) {
		bin := tool(t, "qemu-nbd")
		for _, writable := range []bool{false, true} {
			t.Run(fmt.Sprintf("writable=%v", writable), func(t *testing.T) {
				traits := nbdtest.Traits{Writable: writable, LeftOut: withoutExtendedHeaders(map[string]string{
					"context/set-for-another-export": "qemu-nbd has no default export beside a named one",
					"request/bad-magic":              "qemu-nbd 7.2 answers EINVAL rather than to hang up",
					"request/disconnect":             "qemu-nbd 7.2 drops requests in flight at DISC",
					"read/hole":                      "the file has no holes, and qemu-nbd looks for no zeroes",
					"status/zeroes":                  "the file has no holes",
					"write/status-follows":           "the file has no holes at first",
					"write/read-only":                "qemu-nbd 7.2 answers EINVAL where the protocol says EPERM",
					"write/beyond-end":               "qemu-nbd 7.2 answers EINVAL where the protocol says ENOSPC",
				})}
				nbdtest.Run(t, traits, func(t *testing.T) nbdtest.Target {
					path := filepath.Join(t.TempDir(), "s")
					args := []string{"-t", "-k", path, "--pid-file=" + path + ".pid", "-e", "8", "-x", "disk", "-f", "raw",
						"--discard=unmap", "--detect-zeroes=off", imageFile(t)}
					if !writable {
						args = append([]string{"-r"}, args...)
					}
					start(t, bin, path+".pid", args...)
					return nbdtest.Target{Export: "disk", Dial: func(t testing.TB) net.Conn { return dialUnix(t, path) }}
				})
			})
		}
	})
}

// withoutExtendedHeaders adds the rules about extended headers, which Debian 12's
// versions of both peers lack.
func withoutExtendedHeaders(leftOut map[string]string) map[string]string {
	for _, rules := range []string{"extended/*", "read/extended", "read/overflow", "status/extended", "status/payload", "write/extended*"} {
		leftOut[rules] = "this version has no extended headers"
	}
	return leftOut
}

// start runs a server until the end of the test, and waits for its PID file,
// which both peers write once they listen.
func start(t *testing.T, bin, pidFile string, args ...string) {
	t.Helper()
	cmd := exec.Command(bin, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
	})
	for {
		if b, err := os.ReadFile(pidFile); err == nil && len(b) > 0 {
			return
		}
		select {
		case err := <-exited:
			exited <- err
			t.Fatalf("%s ended: %v\n%s", bin, err, out.String())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

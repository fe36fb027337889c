package nbd

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// A client's writes that were acknowledged but not flushed survive kill -9.
func TestKilledServerKeepsWrites(t *testing.T) {
	s := newSite(t)
	overlays := s.path("overlays")
	srv := s.serve("--writable", "--overlay-dir", overlays, "--keep")
	// The client ends without a flush, as if its server had died.
	s.run("nbdsh", "-c", fmt.Sprintf(`
import os
h.connect_uri(%q)
for i in range(256):
    h.pwrite(bytes([i]) * 4096, i * 65536)
h.zero(4096, 300 * 65536)
os._exit(0)
`, srv.uri("shop/db@latest")))
	srv.kill()
	srv = s.serve("--writable", "--overlay-dir", overlays, "--keep")
	s.run("nbdsh", "-c", fmt.Sprintf(`
h.connect_uri(%q)
h.flush()
for i in range(256):
    assert h.pread(4096, i * 65536) == bytes([i]) * 4096, i
assert h.pread(4096, 300 * 65536) == bytes(4096)
h.shutdown()
`, srv.uri("shop/db@latest")))
}

// The kernel writes to a kept overlay while the server, and "varve attach", are killed
// and restarted: the device continues, with all acknowledged writes.
func TestKernelOutlivesKilledServer(t *testing.T) {
	if os.Getenv("VARVE_TEST_KERNEL") == "" {
		t.Skip("boots a virtual machine: run it with \"make e2e-nbd\"")
	}
	s := newSite(t)
	args := []string{"--writable", "--overlay-dir", s.path("overlays"), "--keep"}
	srv := s.serve(append(args, "--listen", "127.0.0.1:0")...)
	_, port, _ := strings.Cut(srv.addresses[1], ":")
	script := fmt.Sprintf(`
uri=nbd://10.0.2.2:%s/shop/db@latest
dd if=/dev/urandom of=/tmp/blob bs=4k count=256 2>/dev/null
echo "STEP attach"
varve attach $uri /dev/nbd0 --reconnect --dead-timeout 30m >/tmp/first 2>&1 &
watcher=$!
while ! grep -q "nbd0 is" /tmp/first; do sleep 0.1; done
test "$(cat /sys/block/nbd0/queue/io_timeout)" = 5000
test "$(cat /sys/block/nbd0/queue/max_sectors_kb)" = 1024
grep -q "^varve %d [0-9a-f]* shop/db@20" /sys/block/nbd0/backend
echo "STEP write without a flush, and go on writing elsewhere"
dd if=/tmp/blob of=/dev/nbd0 bs=4k oflag=direct 2>/dev/null
while [ ! -e /tmp/enough ]; do
	dd if=/tmp/blob of=/dev/nbd0 bs=4k seek=1024 oflag=direct 2>/dev/null || touch /tmp/failed
done &
writer=$!
kill -9 $watcher
echo "HOST KILL"
while varve nbd info $uri >/dev/null 2>&1; do sleep 0.1; done
if varve attach nbd://10.0.2.2:%s/shop/other@latest /dev/nbd0 --reconnect; then false; fi
varve attach $uri /dev/nbd0 --reconnect --dead-timeout 30m >/tmp/second 2>&1 &
while ! grep -q "nbd0 is" /tmp/second; do sleep 0.1; done
echo "HOST START"
while ! grep -q "connected again" /tmp/second; do sleep 0.1; done
touch /tmp/enough
began=$(date +%%s)
wait $writer
echo "the writer went on $(($(date +%%s) - began)) seconds after the connection"
test ! -e /tmp/failed
echo 3 >/proc/sys/vm/drop_caches
for at in 0 1024; do
	dd if=/dev/nbd0 bs=4k skip=$at count=256 2>/dev/null | cmp - /tmp/blob
done
varve detach /dev/nbd0
wait
`, port, diskSize, port)
	s.guest(script, "", func(line string) {
		t.Log(line)
		switch {
		case strings.Contains(line, "HOST KILL"):
			srv.kill()
		case strings.Contains(line, "HOST START"):
			s.serve(append(args, "--listen", "127.0.0.1:"+port)...)
		}
	})
}

package nbd

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The Linux kernel as a client: ext4 and xfs, mounted from exports that
// "varve attach" (netlink and ioctl) and nbd-client connected.
func TestKernel(t *testing.T) {
	if os.Getenv("VARVE_TEST_KERNEL") == "" {
		t.Skip("boots a virtual machine: run it with \"make e2e-nbd\"")
	}
	s := &site{t: t, dir: t.TempDir()}
	s.varve("repo", "create", "filesystem", "--path", s.path("repo"))
	files := s.path("files")
	if err := os.Mkdir(files, 0o755); err != nil {
		t.Fatal(err)
	}
	// A file in the root of each file system, with the hash that the guest must see.
	payload := strings.Repeat("the same bytes, read through a kernel\n", 100_000)
	if err := os.WriteFile(filepath.Join(files, "payload"), []byte(payload), 0o644); err != nil {
		t.Fatal(err)
	}
	sum := strings.Fields(s.run("sha256sum", filepath.Join(files, "payload")))[0]
	ext4, xfs := s.path("ext4.img"), s.path("xfs.img")
	s.run("truncate", "-s", "64M", ext4)
	s.run("mke2fs", "-q", "-t", "ext4", "-d", files, ext4)
	s.run("truncate", "-s", "320M", xfs)
	proto := s.path("xfs.proto")
	if err := os.WriteFile(proto, []byte("/dev/null\n0 0\nd--755 0 0\npayload ---644 0 0 "+filepath.Join(files, "payload")+"\n$\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.run("mkfs.xfs", "-q", "-p", proto, xfs)
	s.varve("backup", ext4, "--volume", "k/ext4")
	s.varve("backup", xfs, "--volume", "k/xfs")

	readonly := s.serve("--listen", "127.0.0.1:0")
	overlays := s.path("overlays")
	writable := s.serve("--listen", "127.0.0.1:0", "--writable", "--overlay-dir", overlays, "--keep")
	restarted := s.serve("--listen", "127.0.0.1:0")
	port := func(srv *server) string {
		_, p, _ := strings.Cut(srv.addresses[1], ":")
		return p
	}
	script := fmt.Sprintf(`
ro=nbd://10.0.2.2:%s rw=nbd://10.0.2.2:%s re=nbd://10.0.2.2:%s sum=%s
check() { test "$(sha256sum /mnt/payload | cut -d' ' -f1)" = $sum; }
echo "STEP attach by netlink, four connections, read-only ext4"
varve attach $ro/k/ext4@latest /dev/nbd3 --connections 4
test "$(blockdev --getro /dev/nbd3)" = 1
test "$(blockdev --getsize64 /dev/nbd3)" = 67108864
mount -t ext4 -o ro,noload /dev/nbd3 /mnt
check
umount /mnt
varve detach /dev/nbd3
echo "STEP a device of the kernel's choice, xfs"
varve attach $ro/k/xfs@latest | tee /tmp/out
dev=$(cut -d' ' -f1 /tmp/out)
mount -t xfs -o ro,norecovery $dev /mnt
check
umount /mnt
varve detach $dev
echo "STEP writable ext4, one connection, FLUSH"
if varve attach $rw/k/ext4@latest /dev/nbd4 --connections 4; then false; fi
varve attach $rw/k/ext4@latest /dev/nbd4
test "$(blockdev --getro /dev/nbd4)" = 0
test "$(cat /sys/block/nbd4/queue/write_cache)" = "write back"
test "$(cat /sys/block/nbd4/queue/fua)" = 1
mount -t ext4 /dev/nbd4 /mnt
check
dd if=/dev/urandom of=/mnt/new bs=64k count=64 conv=fsync 2>/dev/null
new=$(sha256sum /mnt/new | cut -d' ' -f1)
umount /mnt
varve detach /dev/nbd4
echo "STEP writable xfs by ioctl, and what ext4 kept"
varve attach $rw/k/xfs@latest /dev/nbd5 --ioctl >/tmp/ioctl &
while ! grep -q nbd5 /tmp/ioctl; do sleep 0.1; done
mount -t xfs /dev/nbd5 /mnt
check
echo kept >/mnt/kept
umount /mnt
varve detach /dev/nbd5
wait
varve attach $rw/k/ext4@latest /dev/nbd4
mount -t ext4 /dev/nbd4 /mnt
test "$(sha256sum /mnt/new | cut -d' ' -f1)" = $new
umount /mnt
varve detach /dev/nbd4
echo "STEP nbd-client, -C 4"
nbd-client 10.0.2.2 %s /dev/nbd6 -N k/xfs@latest -C 4
mount -t xfs -o ro,norecovery /dev/nbd6 /mnt
check
umount /mnt
nbd-client -d /dev/nbd6
echo "STEP the server is restarted under a reader"
varve attach $re/k/ext4@latest /dev/nbd7 --connections 4 --reconnect --dead-timeout 30m >/tmp/re 2>&1 &
while ! grep -q "nbd7 is" /tmp/re; do sleep 0.1; done
whole=$(sha256sum </dev/nbd7)
while [ ! -e /tmp/enough ]; do
	echo 3 >/proc/sys/vm/drop_caches
	sha256sum </dev/nbd7 || echo failed
done >/tmp/sums &
reader=$!
echo "HOST RESTART"
while ! grep -q "connected again" /tmp/re; do sleep 0.1; done
echo 3 >/proc/sys/vm/drop_caches
test "$(sha256sum </dev/nbd7)" = "$whole"
touch /tmp/enough
wait $reader
test "$(sort -u /tmp/sums)" = "$whole"
mount -t ext4 -o ro,noload /dev/nbd7 /mnt
check
umount /mnt
varve detach /dev/nbd7
wait
`, port(readonly), port(writable), port(restarted), sum, port(readonly))
	s.guest(script, "", func(line string) {
		if strings.Contains(line, "HOST RESTART") {
			restarted.stop()
			s.serve("--listen", "127.0.0.1:"+port(restarted))
		}
	})
	flushes := strings.Count(s.varve("nbd", "map", "--context", "qemu:allocation-depth", writable.uri("k/ext4@latest")), "\n")
	if flushes < 3 {
		t.Error("nothing was written to the overlay")
	}
}

// guest runs a script in a virtual machine, and passes its output to line; data, if any,
// is /data there.
func (s *site) guest(script, data string, line func(string)) {
	s.t.Helper()
	t := s.t
	file := s.path("script")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	cache, err := filepath.Abs("../../.cache/guest")
	if err != nil {
		t.Fatal(err)
	}
	guest, err := filepath.Abs("guest.sh")
	if err != nil {
		t.Fatal(err)
	}
	args := []string{cache, varveBin, file}
	if data != "" {
		args = append(args, data)
	}
	cmd := s.command(guest, args...)
	cmd.Env = append(cmd.Env, "GUEST_TIMEOUT=3000") // for one that hangs: without hardware virtualization, and behind all other tests, a step may take minutes
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		out.WriteString(lines.Text() + "\n")
		line(lines.Text())
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "GUEST DONE") {
		t.Errorf("in the guest: %v\n%s", err, out.String())
	}
}

package nbd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// "varve mount --kernel" on a machine with NBD but without FUSE and loop devices: what is
// mounted, and that nothing stays after any end of the mount or its process.
func TestKernelMount(t *testing.T) {
	if os.Getenv("VARVE_TEST_KERNEL") == "" {
		t.Skip("boots a virtual machine: run it with \"make e2e-nbd\"")
	}
	if os.Geteuid() != 0 {
		t.Skip("making disks that were cut off at work needs root")
	}
	s := &site{t: t, dir: t.TempDir()}
	s.varve("repo", "create", "filesystem", "--path", s.path("data/repo"))
	sums := map[string]string{}
	for _, d := range []struct {
		name, size string
		mkfs       []string
	}{
		{"ext4", "64M", []string{"mkfs.ext4", "-q", "-F"}},
		{"xfs", "320M", []string{"mkfs.xfs", "-q", "-f"}},
	} {
		clean, dirty := s.path(d.name+".img"), s.path(d.name+"-dirty.img")
		s.run("truncate", "-s", d.size, clean)
		s.run(d.mkfs[0], append(d.mkfs[1:], clean)...)
		s.fill(clean, "", "first")
		sums[d.name] = s.treeSum(clean)
		s.fill(clean, dirty, "late")
		// The kernel of this machine replays the journal of a copy.
		replayed := s.path("replayed.img")
		s.run("cp", "--sparse=always", dirty, replayed)
		sums[d.name+"-dirty"] = s.treeSum(replayed)
		if d.name == "ext4" {
			sums["ext4"] = s.treeSum(clean) // as it is now
			table := "label: gpt\nstart=1MiB,size=4MiB\nstart=5MiB,size=64MiB\n"
			disk := s.path("disk.img")
			s.run("truncate", "-s", "80M", disk)
			s.run("sh", "-c", "printf '"+table+"' | sfdisk -q "+disk)
			s.run("dd", "if="+dirty, "of="+disk, "bs=1M", "seek=5", "conv=notrunc,sparse", "status=none")
			s.varve("backup", disk, "--volume", "k/disk")
			s.varve("backup", clean, "--volume", "k/ext4")
		}
		s.varve("backup", dirty, "--volume", "k/"+d.name+"-dirty")
	}
	s.guest(fmt.Sprintf(kernelMounts, sums["ext4"], sums["ext4-dirty"], sums["xfs-dirty"]), s.path("data"), func(string) {})
}

// kernelMounts is the guest's script.
const kernelMounts = `
export VARVE_PASSWORD="correct horse" VARVE_CONFIG=/tmp/config
ext4=%s dirty=%s xfs=%s
varve repo connect filesystem --path /data/repo >/dev/null
sum() { (cd /mnt; find . -type f | sort | xargs sha256sum) | sha256sum | cut -d' ' -f1; }
device() { awk '$2 == "/mnt" {print $1}' /proc/mounts; }
# pids lists processes by their command line, which dead ones have not.
pids() {
	for p in /proc/[0-9]*; do
		case "$(tr '\0' ' ' 2>/dev/null <$p/cmdline)" in $1) echo ${p#/proc/} ;; esac
	done
}
serving() { pids "*varve mount --kernel*"; }
watching() { pids "*exe mount-watch*"; }
# On a condition, not for a time: the guest itself has a time limit.
until_gone() {
	while [ -n "$(serving)$(watching)" ]; do sleep 0.1; done
	test -z "$(device)"
	test -z "$(ls /run/varve)"
	for pid in /sys/block/nbd*/pid; do test ! -e $pid; done
}
test ! -e /dev/fuse
test ! -e /dev/loop-control
echo "STEP a clean journal is mounted from a device that is read-only"
varve mount --kernel k/ext4@latest /mnt --daemon
case $(device) in /dev/nbd*) ;; *) false ;; esac
test "$(blockdev --getro $(device))" = 1
test "$(sum)" = $ext4
if touch /mnt/new 2>/dev/null; then false; fi
varve umount /mnt
until_gone
echo "STEP a dirty ext4 journal is replayed into an overlay; umount(8) ends the process"
varve mount --kernel k/ext4-dirty@latest /mnt --daemon
test "$(blockdev --getro $(device))" = 0
test "$(sum)" = $dirty
umount /mnt
until_gone
echo "STEP a dirty xfs log; a signal ends it"
varve mount --kernel k/xfs-dirty@latest /mnt --daemon
test "$(sum)" = $xfs
kill -TERM $(serving)
until_gone
echo "STEP a partition; in use"
varve mount --kernel k/disk@latest --partition p2 /mnt --daemon
test "$(sum)" = $dirty
if varve mount --kernel k/ext4@latest /mnt 2>/tmp/err; then false; fi
grep "mounted on /mnt already" /tmp/err
exec 5</mnt/first-1
if varve umount /mnt 2>/tmp/err; then false; fi
grep "in use" /tmp/err
test "$(sum)" = $dirty
exec 5<&-
varve umount /mnt
until_gone
echo "STEP kill -9 under readers"
varve mount --kernel k/xfs-dirty@latest /mnt --daemon
(while :; do echo 3 >/proc/sys/vm/drop_caches; cat /mnt/* >/dev/null 2>&1 || break; done) &
kill -9 $(serving)
until_gone
wait
echo "STEP kill -9, of the watch too: the next mount cleans up"
varve mount --kernel k/ext4-dirty@latest /mnt --daemon
dead=$(device)
kill -9 $(watching) $(serving)
while [ -n "$(serving)" ]; do sleep 0.1; done
test "$(device)" = $dead
varve mount --kernel k/ext4-dirty@latest /mnt --daemon
test "$(sum)" = $dirty
test "$(grep -c ' /mnt ' /proc/mounts)" = 1
varve umount /mnt
until_gone
echo "STEP without FUSE a loop device cannot be had"
if varve mount --kernel --loop k/ext4@latest /mnt 2>/tmp/err; then false; fi
grep "FUSE cannot be used" /tmp/err
until_gone
`

// fill writes files to the file system of an image. A copy, if one is named, is taken
// during writes: with a journal that is not clean.
func (s *site) fill(image, copied, prefix string) {
	s.t.Helper()
	dir := s.path("mnt")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.run("mount", "-o", "loop", image, dir)
	defer s.run("umount", dir)
	for i := range 60 {
		name := filepath.Join(dir, fmt.Sprintf("%s-%d", prefix, i))
		if err := os.WriteFile(name, []byte(strings.Repeat(name, 2000)), 0o640); err != nil {
			s.t.Fatal(err)
		}
	}
	if copied == "" {
		return
	}
	// fsync writes the journal, and leaves the final places for later.
	f, err := os.OpenFile(filepath.Join(dir, prefix+"-7"), os.O_RDWR, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		s.t.Fatal(err)
	}
	s.run("cp", "--sparse=always", image, copied)
}

// treeSum hashes names and contents of an image's files, as the kernel shows them.
func (s *site) treeSum(image string) string {
	s.t.Helper()
	dir := s.path("sum")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.run("mount", "-o", "loop", image, dir)
	defer s.run("umount", dir)
	out := s.run("sh", "-c", "(cd "+dir+"; find . -type f | sort | xargs sha256sum) | sha256sum | cut -d' ' -f1")
	return strings.TrimSpace(out)
}

package disk

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ext4Image makes an image file with an empty ext4.
func ext4Image(t *testing.T) string {
	t.Helper()
	needRoot(t)

	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("mkfs.ext4 is not installed")
	}

	path := tempFile(t, make([]byte, 8<<20))
	run(t, "mkfs.ext4", "-q", "-F", path)
	return path
}

// expectInUse checks a refusal and its text.
func expectInUse(t *testing.T, err error, texts ...string) {
	t.Helper()

	var refused *InUseError
	if !errors.Is(err, ErrMounted) || !errors.As(err, &refused) {
		t.Fatalf("error %v, want an *InUseError", err)
	}

	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("the message lacks %q: %v", text, err)
		}
	}
}

func TestMountedDevice(t *testing.T) {
	image := ext4Image(t)
	device := loop(t, image)
	point := mountAt(t, device)

	_, err := Open(device, Options{})
	expectInUse(t, err, device, point, "--live", "snapshot")

	_, err = Open(image, Options{})
	expectInUse(t, err, device, point, "--live")

	for _, path := range []string{device, image} {
		_, err = OpenTarget(path, TargetOptions{Size: 8 << 20})
		expectInUse(t, err, point, "--force")

		s := openSource(t, path, Options{Live: true})
		if !strings.Contains(s.InUse(), point) {
			t.Errorf("InUse of %s = %q, which lacks %s", path, s.InUse(), point)
		}
	}

	// The image has not been emptied by the refused restore.
	if info, err := os.Stat(image); err != nil || info.Size() != 8<<20 {
		t.Errorf("the image after a refused restore: %v, %v", info, err)
	}
}

func TestMountedReadOnly(t *testing.T) {
	device := loop(t, ext4Image(t))
	point := mountAt(t, device, "-o", "ro,noload")

	if s := openSource(t, device, Options{}); s.InUse() != "" {
		t.Errorf("InUse = %q of a disk mounted read-only", s.InUse())
	}

	_, err := OpenTarget(device, TargetOptions{Size: 8 << 20})
	expectInUse(t, err, "read-only", point)
}

// TestMountedReadOnlyInOnePlace: one of two mounts is read-only, the file system is not.
func TestMountedReadOnlyInOnePlace(t *testing.T) {
	device := loop(t, ext4Image(t))
	mountAt(t, mountAt(t, device), "--bind", "-o", "ro")

	_, err := Open(device, Options{})
	expectInUse(t, err)
}

// TestMountedElsewhere hides the mount in another mount namespace.
func TestMountedElsewhere(t *testing.T) {
	image := ext4Image(t)
	device := loop(t, image)
	point := t.TempDir()

	// The shell mounts in another namespace, says so, and waits for its input to end. What others unmount is
	// unmounted there, too: a copy would keep the devices of tests beside this one busy.
	shell := exec.Command("unshare", "-m", "--propagation", "slave", "sh", "-c", `mount "$0" "$1" && echo mounted && read line; umount "$1"`, device, point)

	input, err := shell.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}

	output, err := shell.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}

	if err := shell.Start(); err != nil {
		t.Skipf("no unshare: %v", err)
	}

	t.Cleanup(func() {
		if err := errors.Join(input.Close(), shell.Wait()); err != nil {
			t.Error(err)
		}
	})

	word := make([]byte, 8)
	if n, err := output.Read(word); err != nil {
		t.Fatalf("the mount in another namespace: %d, %v", n, err)
	}

	for _, path := range []string{device, image} {
		_, err = Open(path, Options{})
		expectInUse(t, err, "another program or container")

		_, err = OpenTarget(path, TargetOptions{Size: 8 << 20})
		expectInUse(t, err)
	}
}

func TestMountedPartition(t *testing.T) {
	needRoot(t)

	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("mkfs.ext4 is not installed")
	}

	// addpart tells the kernel of partitions; not every kernel reads a table by itself.
	image := tempFile(t, make([]byte, 20<<20))
	disk := loop(t, image, "-P")
	first, second := disk+"p1", disk+"p2"

	run(t, "addpart", disk, "1", "2048", "16384")
	run(t, "addpart", disk, "2", "18432", "16384")
	waitFor(t, second)
	run(t, "mkfs.ext4", "-q", "-F", first)
	point := mountAt(t, first)

	for _, path := range []string{disk, first, image} {
		_, err := Open(path, Options{})
		expectInUse(t, err, first+" is mounted", point)
	}

	// The other partition is not affected.
	openSource(t, second, Options{})

	a := openTarget(t, second, TargetOptions{Size: 1 << 20})
	if !strings.Contains(a.Identity(), "partition 2") {
		t.Errorf("Identity of a partition: %q", a.Identity())
	}
}

// waitFor waits for a device node, which udev or the kernel makes a moment later.
func waitFor(t *testing.T, path string) {
	t.Helper()

	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return
		}
	}

	t.Fatalf("%s did not appear", path)
}

func TestSwap(t *testing.T) {
	needRoot(t)

	image := tempFile(t, make([]byte, 1<<20))
	device := loop(t, image)

	run(t, "mkswap", "-q", device)

	if out, err := exec.Command("swapon", device).CombinedOutput(); err != nil {
		t.Skipf("this kernel does not swap: %s", out)
	}

	t.Cleanup(func() { run(t, "swapoff", device) })

	for _, path := range []string{device, image} {
		_, err := Open(path, Options{})
		expectInUse(t, err, "swapped to")

		_, err = OpenTarget(path, TargetOptions{Size: 1 << 20})
		expectInUse(t, err, "swapped to")
	}
}

func TestLoopOnATargetFile(t *testing.T) {
	image := tempFile(t, random(1<<20, 1))
	device := loop(t, image)

	openSource(t, image, Options{}) // attaching it does not write

	_, err := OpenTarget(image, TargetOptions{Size: 1 << 20})
	expectInUse(t, err, device)

	if target := openTarget(t, image, TargetOptions{Size: 1 << 20, Force: true, Keep: true}); target.Size() != 1<<20 {
		t.Errorf("Size %d", target.Size())
	}
}

func TestTargetClaimsItsDevice(t *testing.T) {
	device := loop(t, tempFile(t, make([]byte, 1<<20)))
	target := openTarget(t, device, TargetOptions{Size: 1 << 20})

	_, err := OpenTarget(device, TargetOptions{Size: 1 << 20})
	expectInUse(t, err, "exclusively")

	_, err = Open(device, Options{})
	expectInUse(t, err, "exclusively")

	openTarget(t, device, TargetOptions{Size: 1 << 20, Force: true})

	if err := target.Close(); err != nil {
		t.Fatal(err)
	}

	openSource(t, device, Options{})
}

// TestTwoSourcesAtOnce: asking whether a device is claimed must not look like a claim.
func TestTwoSourcesAtOnce(t *testing.T) {
	device := loop(t, tempFile(t, make([]byte, 1<<20)))
	results := make(chan error)

	for range 2 {
		go func() {
			for range 50 {
				s, err := Open(device, Options{})
				if err == nil {
					err = s.Close()
				}

				if err != nil {
					results <- err
					return
				}
			}

			results <- nil
		}()
	}

	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

const mountinfo = `22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
36 35 98:0 /mnt1 /mnt\0402\134x ro,noatime master:1 propagate_from:2 - ext3 /dev/root ro,errors=continue
37 27 8:17 / /r ro - xfs /dev/sdb1 rw
40 27 0:44 / /b rw - btrfs /dev/sdc rw,space_cache
garbage
1 2 x:y / / rw - ext4 /dev/x rw
`

func TestParseMountinfo(t *testing.T) {
	mounts, err := parseMountinfo(strings.NewReader(mountinfo))
	if err != nil {
		t.Fatal(err)
	}

	want := []mount{
		{unix.Mkdev(0, 21), "/proc", "proc", false},
		{unix.Mkdev(254, 0), "/", "/dev/vda", false},
		{unix.Mkdev(98, 0), `/mnt 2\x`, "/dev/root", true},
		{unix.Mkdev(8, 17), "/r", "/dev/sdb1", false},
		{unix.Mkdev(0, 44), "/b", "/dev/sdc", false},
	}

	if len(mounts) != len(want) {
		t.Fatalf("%d mounts, want %d: %v", len(mounts), len(want), mounts)
	}

	for i := range want {
		if mounts[i] != want[i] {
			t.Errorf("mount %+v, want %+v", mounts[i], want[i])
		}
	}
}

func FuzzParseMountinfo(f *testing.F) {
	f.Add(mountinfo)
	f.Fuzz(func(_ *testing.T, text string) {
		_, _ = parseMountinfo(strings.NewReader(text)) // does not panic
	})
}

// TestHolders examines a fake sysfs: not every test machine has RAID, LVM and multi-device
// btrfs.
func TestHolders(t *testing.T) {
	root := t.TempDir()
	write := func(path, text string) {
		t.Helper()

		path = filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	link := func(target, path string) {
		t.Helper()

		path = filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.Symlink(filepath.Join(root, target), path)); err != nil {
			t.Fatal(err)
		}
	}

	// sda has partition sda1, which carries dm-0, which is mounted; sda2 is in btrfs.
	write("sys/devices/sda/dev", "508:0\n")
	write("sys/devices/sda/sda1/dev", "508:1\n")
	write("sys/devices/sda/sda1/partition", "1\n")
	write("sys/devices/sda/sda2/dev", "508:2\n")
	write("sys/devices/sda/sda2/partition", "2\n")
	write("sys/devices/dm-0/dev", "509:0\n")
	link("sys/devices/dm-0", "sys/devices/sda/sda1/holders/dm-0")
	link("sys/devices/sda", "sys/dev/block/508:0")
	link("sys/devices/sda/sda1", "sys/dev/block/508:1")
	link("sys/devices/sda/sda2", "sys/dev/block/508:2")
	link("sys/devices/dm-0", "sys/dev/block/509:0")
	link("sys/devices/sda/sda2", "sys/fs/btrfs/abc/devices/sda2")
	write("proc/self/mountinfo", "27 1 509:0 / /data rw - ext4 /dev/mapper/x rw\n")
	write("proc/swaps", "Filename Type Size Used Priority\n")

	uses := func(number uint64) string {
		t.Helper()

		s := newSurvey()
		s.proc, s.sys = filepath.Join(root, "proc"), filepath.Join(root, "sys")

		if err := s.device(number, "disk"); err != nil {
			t.Fatal(err)
		}

		texts := make([]string, len(s.uses))
		for i, u := range s.uses {
			texts[i] = u.String()
		}
		return strings.Join(texts, "; ")
	}

	for number, want := range map[uint64]string{
		unix.Mkdev(508, 0): "/dev/sda1 carries /dev/dm-0; /dev/dm-0 is mounted at /data; /dev/sda2 is mounted at btrfs abc",
		unix.Mkdev(508, 1): "disk carries /dev/dm-0; /dev/dm-0 is mounted at /data",
		unix.Mkdev(508, 2): "disk is mounted at btrfs abc",
		unix.Mkdev(509, 0): "disk is mounted at /data",
		unix.Mkdev(510, 0): "",
	} {
		if got := uses(number); got != want {
			t.Errorf("uses of %d:%d = %q, want %q", unix.Major(number), unix.Minor(number), got, want)
		}
	}
}

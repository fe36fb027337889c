package fusefs_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// The tree can be unmounted while many programs read it: it disappears from the directory,
// and no reader hangs.
func TestUnmountUnderLoad(t *testing.T) {
	image := newVolume(t, 64*mib, slices.Clone(mkExt4), 50)
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{CacheBytes: 1 << 20})
	var readers sync.WaitGroup
	var stop atomic.Bool
	started := make(chan struct{}, 16)
	for i := range 16 {
		readers.Go(func() {
			name := "disk.img"
			if i%2 == 0 {
				name = "files/a/b/c/data"
			}
			f, err := os.Open(m.latest(shopDB, name))
			if err != nil {
				t.Error(err)
				started <- struct{}{}
				return
			}
			defer f.Close()
			first := true
			buf := make([]byte, 64<<10)
			for off := int64(0); !stop.Load(); off = (off + 64<<10) % (3 * mib) {
				if _, err := f.ReadAt(buf, off); err != nil {
					t.Error(err)
					return
				}
				if first {
					first = false
					started <- struct{}{}
				}
			}
		})
	}
	for range 16 {
		<-started
	}
	if err := fusefs.Unmount(m.Dir, false); !errors.Is(err, fusefs.ErrBusy) {
		t.Errorf("a mount in use was unmounted: %v", err)
	}
	if err := fusefs.Unmount(m.Dir, true); err != nil {
		t.Fatal(err)
	}
	if got := names(t, m.Dir); len(got) != 0 {
		t.Errorf("the directory still shows %q", got)
	}
	stop.Store(true)
	readers.Wait()
	<-m.Done()
}

// A killed process leaves no mount if fusermount3 can remove it.
func TestKilledProcessIsUnmounted(t *testing.T) {
	needFUSE(t)
	r := repotest.New(t)
	save(t, r.Open(t), shopDB, diskfstest.NewImage(t, mib))
	dir := t.TempDir()
	child := startChild(t, r, dir)
	if got := names(t, dir); !slices.Equal(got, []string{"shop"}) {
		t.Fatalf("the tree holds %q", got)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	wait(t, func() bool { return errors.Is(fusefs.Unmount(dir, false), fusefs.ErrNotMounted) })
	if got := names(t, dir); len(got) != 0 {
		t.Errorf("the directory still shows %q", got)
	}
}

// If it cannot, the next mount removes the dead one.
func TestDeadMountIsTakenAway(t *testing.T) {
	diskfstest.NeedRoot(t)
	needFUSE(t)
	r := repotest.New(t)
	repo := r.Open(t)
	save(t, repo, shopDB, diskfstest.NewImage(t, mib))
	dir := t.TempDir()
	child := startChild(t, r, dir, "PATH=/nonexistent") // no fusermount3: root mounts directly
	if _, err := os.Stat(dir); err != nil {             // which the kernel caches for a second
		t.Fatal(err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	if _, err := os.ReadDir(dir); !errors.Is(err, unix.ENOTCONN) {
		t.Fatalf("the mount is not dead: %v", err)
	}
	tree, err := fusefs.New(t.Context(), repo, fusefs.Options{Cluster: shopDB.Cluster})
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	m, err := tree.Mount(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if got := names(t, dir); !slices.Equal(got, []string{"shop"}) {
		t.Errorf("the tree holds %q", got)
	}
	other, err := fusefs.New(t.Context(), repo, fusefs.Options{Cluster: shopDB.Cluster})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := other.Mount(dir); err == nil || !strings.Contains(err.Error(), "varve umount") {
		t.Errorf("a second mount on the same directory: %v", err)
	}
}

// fio writes a writable disk.img and reads every byte back, and the recovery point does not
// change.
func TestWritableDisk(t *testing.T) {
	t.Setenv("TMPDIR", "") // it would change the place of overlays
	needFUSE(t)
	diskfstest.NeedTool(t, "fio")
	image := newVolume(t, 64*mib, slices.Clone(mkExt4), 5)
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{Writable: true})
	disk := m.latest(shopDB, "disk.img")
	t.Chdir(t.TempDir()) // where fio leaves its state
	diskfstest.Run(t, "fio", "--name=verify", "--filename="+disk, "--rw=randwrite", "--bsrange=512-64k", "--size=16m", "--numjobs=1",
		"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--ioengine=psync", "--fsync=64", "--allow_file_create=0")
	info := m.info(t, shopDB)
	if used := info.Overlay; used == nil || used.Used == 0 {
		t.Errorf("the overlay has %+v", used)
	}
	if dirs, err := filepath.Glob(filepath.Join(overlay.ScratchParent(), "*", info.ID)); err != nil || len(dirs) != 1 {
		t.Errorf("overlays in %s: %q, %v", overlay.ScratchParent(), dirs, err)
	}
	// Discards through a loop device arrive as holes.
	loop := strings.TrimSpace(diskfstest.Run(t, "losetup", "--find", "--show", disk))
	defer diskfstest.Run(t, "losetup", "--detach", loop)
	diskfstest.Run(t, "blkdiscard", "-f", "-o", "1048576", "-l", "1048576", loop)
	f, _ := diskfstest.Open(t, disk)
	b := make([]byte, mib)
	if _, err := f.ReadAt(b, mib); err != nil || strings.Trim(string(b), "\x00") != "" {
		t.Errorf("a discarded range does not read as zeroes: %v", err)
	}
	f.Close()
	clean := mount(t, repo, fusefs.Options{})
	checkDisk(t, clean.latest(shopDB, "disk.img"), image)
}

// Many readers get the same bytes from a recovery point as fio wrote, verified.
func TestManyReaders(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedTool(t, "fio")
	image := diskfstest.NewImage(t, 40*mib) // the end is a hole
	t.Chdir(t.TempDir())
	diskfstest.Run(t, "fio", "--name=write", "--filename="+image, "--rw=randwrite", "--bs=4k", "--size=32m",
		"--verify=crc32c", "--do_verify=0", "--ioengine=psync", "--allow_file_create=0")
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{})
	disk := m.latest(shopDB, "disk.img")
	diskfstest.Run(t, "fio", "--name=readers", "--filename="+disk, "--rw=randread", "--bs=4k", "--size=32m", "--numjobs=16",
		"--verify=crc32c", "--verify_fatal=1", "--ioengine=psync", "--readonly", "--allow_file_create=0")
	checkDisk(t, disk, image)
}

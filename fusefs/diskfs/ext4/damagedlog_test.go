//go:build linux

package ext4

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/mounttest"
)

// mounts reports whether the kernel mounts a copy of an image.
func mounts(t *testing.T, image string) bool {
	t.Helper()
	loop := strings.TrimSpace(diskfstest.Run(t, "losetup", "--find", "--show", diskfstest.CopyImage(t, image)))
	defer diskfstest.Run(t, "losetup", "--detach", loop)
	dir := t.TempDir()
	if err := exec.Command("mount", "-t", "ext4", loop, dir).Run(); err != nil {
		return false
	}
	mounttest.Unmount(t, dir)
	return true
}

// TestDamagedJournal damages each kind of block of a log: a journal that the kernel refuses
// is refused, unless its state is not asked for.
func TestDamagedJournal(t *testing.T) {
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "debugfs")
	image := diskfstest.NewImage(t, 32<<20)
	mkfs(t, image, "-t", "ext4")
	src := t.TempDir()
	data, script := filepath.Join(src, "data"), filepath.Join(src, "script")
	if err := os.WriteFile(data, []byte(strings.Repeat("d", 4*4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	commands := fmt.Sprintf("jo -c -v 3\njw -b 5000-5003 %s\njw -r 5001 %s\njw -b 5002 %s\njc\n", data, os.DevNull, data)
	if err := os.WriteFile(script, []byte(commands), 0o600); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "debugfs", "-w", "-f", script, image)
	r, size := diskfstest.Open(t, image)
	stale, err := Open(r, size, diskfs.Options{Stale: true})
	if err != nil {
		t.Fatal(err)
	}
	file, err := stale.inode(uint64(stale.sb.journalIno))
	if err != nil {
		t.Fatal(err)
	}
	j := &journal{fs: stale, file: file}
	if err := j.readSuperblock(); err != nil {
		t.Fatal(err)
	}
	refused := 0
	for n := j.start; n < j.start+12; n++ {
		b, pos, err := j.block(n)
		if err != nil {
			t.Fatal(err)
		}
		what := uint32(0)
		if be.Uint32(b) == journalMagic {
			what = be.Uint32(b[4:])
		}
		// Beside each field of headers, tags and revoked blocks a byte of the rest.
		for _, at := range []int64{4, 11, 12, 13, 16, 20, 28, 40, 52, 2000, 4095} {
			t.Run(fmt.Sprintf("block %d of type %d byte %d", n, what, at), func(t *testing.T) {
				damaged := diskfstest.CopyImage(t, image)
				f, err := os.OpenFile(damaged, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if _, err := f.WriteAt([]byte{b[at] ^ 0xff}, pos+at); err != nil {
					t.Fatal(err)
				}
				want := mounts(t, damaged)
				v, err := Open(f, size, diskfs.Options{})
				if (err == nil) != want {
					t.Errorf("the kernel mounts it: %v; here: %v", want, err)
				}
				if err == nil && v.Info().Log != diskfs.LogReplayed {
					t.Errorf("log %v", v.Info().Log)
				}
				if want {
					return
				}
				refused++
				if !errors.Is(err, diskfs.ErrDirtyLog) || !errors.Is(err, diskfs.ErrCorrupt) {
					t.Errorf("refused with %v", err)
				}
				if v, err := Open(f, size, diskfs.Options{Stale: true}); err != nil || v.Info().Log != diskfs.LogIgnored {
					t.Errorf("open stale: %v", err)
				}
			})
		}
	}
	if refused == 0 {
		t.Error("the kernel refuses nothing: the test proves nothing")
	}
}

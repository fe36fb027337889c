//go:build linux

package ext4

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// EXT4_IOC_SHUTDOWN and its modes, see ext4.h of the kernel. It stops a file system at once, with the journal forced out or as it is.
const (
	iocShutdown      = 0x8004587d
	shutdownLogFlush = 1
	shutdownNoFlush  = 2
)

// shutdown ends a mounted file system as a power failure does.
func shutdown(t *testing.T, dir string, how int) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), iocShutdown, how); err != nil {
		t.Fatal(err)
	}
}

// disturb changes a tree at random. Errors of the file system are not its concern: names
// collide, and directories are not empty. Some files that are removed stay open.
func disturb(rnd *rand.Rand, dir string, steps int) (open []*os.File) {
	var names []string
	pick := func() string {
		if len(names) == 0 || rnd.IntN(4) == 0 {
			sub := ""
			if rnd.IntN(2) == 0 {
				sub = fmt.Sprintf("w%d/", rnd.IntN(6))
			}
			names = append(names, fmt.Sprintf("%s%d%s", sub, rnd.IntN(2000), strings.Repeat("z", rnd.IntN(150))))
			return filepath.Join(dir, names[len(names)-1])
		}
		return filepath.Join(dir, names[rnd.IntN(len(names))])
	}
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		return b
	}
	for i := range 6 {
		_ = os.Mkdir(filepath.Join(dir, fmt.Sprintf("w%d", i)), 0o755)
	}
	for range steps {
		name := pick()
		switch rnd.IntN(16) {
		case 0, 1, 2:
			_ = os.WriteFile(name, random(rnd.IntN(30_000)), os.FileMode(rnd.IntN(0o777)|0o600))
		case 3:
			if f, err := os.Open(name); err == nil && rnd.IntN(2) == 0 && len(open) < 50 {
				open = append(open, f) // an orphan, where it is removed
			} else if err == nil {
				_ = f.Close()
			}
			_ = os.Remove(name)
		case 4:
			_ = os.Rename(name, pick())
		case 5:
			_ = os.Link(name, pick())
		case 6:
			_ = os.Symlink(strings.Repeat("s", 1+rnd.IntN(1000)), name)
		case 7:
			_ = os.Mkdir(name, 0o755)
		case 8:
			_ = unix.Lsetxattr(name, fmt.Sprintf("user.%d", rnd.IntN(20)), random(rnd.IntN(500)), 0)
		case 9:
			_ = unix.Lremovexattr(name, fmt.Sprintf("user.%d", rnd.IntN(20)))
		case 10:
			_ = os.Truncate(name, int64(rnd.IntN(60_000)))
		case 11:
			at := time.Unix(rnd.Int64N(4e9), rnd.Int64N(1e9))
			_ = os.Chtimes(name, at, at)
		case 12:
			_ = os.Lchown(name, rnd.IntN(5000), rnd.IntN(5000))
		case 13, 14:
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				continue
			}
			_, _ = f.WriteAt(random(rnd.IntN(9000)), rnd.Int64N(1<<20))
			mode := []uint32{0, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_KEEP_SIZE}[rnd.IntN(4)]
			_ = unix.Fallocate(int(f.Fd()), mode, rnd.Int64N(1<<20), 1+rnd.Int64N(1<<17))
			if rnd.IntN(3) == 0 {
				_ = f.Sync()
			}
			_ = f.Close()
		case 15:
			_ = os.RemoveAll(name)
		}
	}
	return open
}

// TestCrash compares, after work at random that a crash cut short, with what the kernel
// shows once it has replayed the journal.
func TestCrash(t *testing.T) {
	diskfstest.NeedRoot(t)
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("EXT4_TEST_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range []struct {
		name, args, mount string
		rounds            int
		how               int
	}{
		{"default", "-t ext4", "", 3, shutdownLogFlush},
		{"as it is", "-t ext4", "", 6, shutdownNoFlush},
		{"1k small journal", "-t ext4 -b 1024 -J size=1", "", 25, shutdownLogFlush},
		{"data in the journal", "-t ext4 -b 2048", "data=journal", 4, shutdownLogFlush},
		{"ext3", "-t ext3 -b 1024", "", 4, shutdownLogFlush},
		{"ext3, 128-byte inodes", "-t ext3 -I 128", "data=journal", 4, shutdownNoFlush},
		{"inline", "-t ext4 -O inline_data -I 512", "", 4, shutdownLogFlush},
		{"bigalloc", "-t ext4 -O bigalloc -C 65536", "", 4, shutdownLogFlush},
		{"fast_commit", "-t ext4 -O fast_commit", "", 1, shutdownLogFlush},
		{"orphan list", "-t ext4 -O ^orphan_file", "", 3, shutdownLogFlush},
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := seed + uint64(i)
			t.Logf("EXT4_TEST_SEED=%d", seed)
			rnd := rand.New(rand.NewPCG(seed, 2))
			image := diskfstest.NewImage(t, 256<<20)
			mkfs(t, image, strings.Fields(c.args)...)
			dir, unmount := diskfstest.Mount(t, image, c.mount)
			var open []*os.File
			for range c.rounds {
				open = append(open, disturb(rnd, dir, 1200/c.rounds)...)
				if c.name != "fast_commit" {
					commitJournal(t, dir)
				}
			}
			open = append(open, disturb(rnd, dir, 200)...)
			shutdown(t, dir, c.how)
			for _, f := range open {
				_ = f.Close()
			}
			unmount()
			f := compareWithKernel(t, image, diskfstest.CopyImage(t, image), diskfstest.Options{})
			if f.Info().Log != diskfs.LogReplayed || len(f.dev.over) == 0 {
				t.Errorf("log %v with %d blocks: the test proves nothing", f.Info().Log, len(f.dev.over))
			}
		})
	}
}

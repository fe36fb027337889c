package xfs

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// shutdown stops the file system at dir at once, as a crash does: with the log forced
// out (XFS_FSOP_GOING_FLAGS_LOGFLUSH) or as it happens to be (…_NOLOGFLUSH).
func shutdown(t testing.TB, dir string, flushLog bool) {
	t.Helper()
	args := []string{"-x", "-c", "shutdown", dir}
	if flushLog {
		args[2] = "shutdown -f"
	}
	run(t, "xfs_io", args...)
}

// workload changes a tree at random. Errors of the file system are not its concern:
// names collide, and directories are not empty.
func workload(p *filler, steps int) {
	rnd := p.rnd
	var names []string
	pick := func() string {
		if len(names) == 0 || rnd.IntN(4) == 0 {
			dir := ""
			if rnd.IntN(2) == 0 {
				dir = fmt.Sprintf("w%d/", rnd.IntN(6))
			}
			name := fmt.Sprintf("%s%d%s", dir, rnd.IntN(2000), strings.Repeat("z", rnd.IntN(150)))
			names = append(names, name)
			return name
		}
		return names[rnd.IntN(len(names))]
	}
	for i := range 6 {
		p.mkdir(fmt.Sprintf("w%d", i))
	}
	for range steps {
		path := p.path(pick())
		switch rnd.IntN(16) {
		case 0, 1, 2:
			_ = os.WriteFile(path, p.bytes(rnd.IntN(30_000)), os.FileMode(rnd.IntN(0o777)|0o600))
		case 3:
			_ = os.Remove(path)
		case 4:
			_ = os.Rename(path, p.path(pick()))
		case 5:
			_ = os.Link(path, p.path(pick()))
		case 6:
			_ = os.Symlink(strings.Repeat("s", 1+rnd.IntN(1000)), path)
		case 7:
			_ = os.Mkdir(path, 0o755)
		case 8:
			_ = unix.Lsetxattr(path, fmt.Sprintf("user.%d", rnd.IntN(20)), p.bytes(rnd.IntN(6000)), 0)
		case 9:
			_ = unix.Lremovexattr(path, fmt.Sprintf("user.%d", rnd.IntN(20)))
		case 10:
			_ = os.Truncate(path, int64(rnd.IntN(60_000)))
		case 11:
			at := time.Unix(rnd.Int64N(4e9), rnd.Int64N(1e9))
			_ = os.Chtimes(path, at, at)
		case 12:
			_ = os.Lchown(path, rnd.IntN(5000), rnd.IntN(5000))
		case 13:
			if f, err := os.OpenFile(path, os.O_RDWR, 0); err == nil {
				_, _ = f.WriteAt(p.bytes(rnd.IntN(9000)), rnd.Int64N(1<<20))
				mode := []uint32{0, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE}[rnd.IntN(3)]
				_ = unix.Fallocate(int(f.Fd()), mode, rnd.Int64N(1<<20), 1+rnd.Int64N(1<<17))
				if rnd.IntN(3) == 0 {
					_ = f.Sync()
				}
				_ = f.Close()
			}
		case 14:
			if a, err := os.Open(path); err == nil {
				if b, err := os.OpenFile(p.path(pick()), os.O_RDWR|os.O_CREATE, 0o644); err == nil {
					_ = unix.IoctlFileClone(int(b.Fd()), int(a.Fd()))
					_ = b.Close()
				}
				_ = a.Close()
			}
		case 15:
			_ = os.RemoveAll(path)
		}
	}
}

// crashed makes an image with a dirty log: settled is written and synced before, act
// is what the crash cuts short.
func crashed(t testing.TB, flushLog bool, mkfs []string, settled, act func(dir string)) string {
	t.Helper()
	return crashedMount(t, "", flushLog, mkfs, settled, act)
}

// crashedMount is crashed under mounts with options.
func crashedMount(t testing.TB, options string, flushLog bool, mkfs []string, settled, act func(dir string)) string {
	t.Helper()
	img := newImage(t, 320, mkfs...)
	if settled != nil {
		mounted(t, img, options, settled)
	}
	mounted(t, img, options, func(dir string) {
		act(dir)
		shutdown(t, dir, flushLog)
	})
	return img
}

// checkReplay compares what this package shows of an image whose log is dirty with
// what the kernel shows of a copy, whose log it replays.
func checkReplay(t testing.TB, img string) *FS {
	t.Helper()
	f := mustOpen(t, img)
	if f.Info().Log != diskfs.LogReplayed {
		t.Errorf("log is %v, should have been replayed", f.Info().Log)
	}
	got := imageTree(t, f)
	kernel := diskfstest.CopyImage(t, img)
	var want map[string]file
	mounted(t, kernel, "", func(dir string) { want = kernelTree(t, dir) })
	compare(t, got, want)
	return f
}

func syncfs(t testing.TB, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Syncfs(int(f.Fd())), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestReplay compares after random workloads that a crash cut short.
func TestReplay(t *testing.T) {
	requireKernel(t)
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("XFS_TEST_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range []struct {
		name     string
		mkfs     []string
		steps    int
		rounds   int
		flushLog bool
		mount    string
	}{
		{"default", nil, 1500, 2, true, ""},
		{"as it is", nil, 3000, 5, false, ""},
		{"small log wraps", []string{"--unsupported", "-l", "size=10m", "-d", "agcount=2"}, 8000, 60, true, ""},
		{"1k rmap nrext64", []string{"-b", "size=1024", "-m", "rmapbt=1", "-i", "nrext64=1"}, 2000, 2, true, ""},
		{"64k directories", []string{"-n", "size=65536", "-m", "bigtime=0"}, 2000, 2, true, ""},
		{"log stripes", []string{"-l", "su=65536"}, 2000, 2, true, ""},
		{"2k inodes", []string{"-i", "size=2048,sparse=1"}, 1000, 2, false, ""},
		{"4k sectors", []string{"-s", "size=4096"}, 2000, 3, true, ""},
		{"64k blocks", []string{"-b", "size=65536"}, 1000, 2, true, ""},
		{"large log buffers", nil, 2000, 2, true, "logbsize=256k"},
		{"log buffers larger than stripes", []string{"-l", "su=65536"}, 2000, 5, false, "logbsize=128k"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			seed := seed + uint64(i)
			t.Logf("XFS_TEST_SEED=%d", seed)
			rnd := rand.New(rand.NewPCG(seed, 2))
			img := crashedMount(t, c.mount, c.flushLog, c.mkfs, func(dir string) {
				workload(newFiller(t, dir, rnd.Uint64()), c.steps/4)
			}, func(dir string) {
				// Each sync writes a checkpoint; without one, changes gather in memory.
				for round := range c.rounds {
					p := newFiller(t, dir, rnd.Uint64())
					workload(p, c.steps/c.rounds)
					if c.name == "small log wraps" {
						p.many(fmt.Sprintf("churn-%d", round%5), 200, 150)
						p.must(os.RemoveAll(p.path(fmt.Sprintf("churn-%d", (round+2)%5))))
					}
					syncfs(t, dir)
				}
				workload(newFiller(t, dir, rnd.Uint64()), c.steps/4)
			})
			f := checkReplay(t, img)
			if c.name != "small log wraps" {
				return
			}
			l, err := f.newLogRing()
			if err != nil {
				t.Fatal(err)
			}
			if cycle, err := l.cycle(0); err != nil || cycle < 2 {
				t.Errorf("log in cycle %d (%v), it should have wrapped", cycle, err)
			}
		})
	}
}

// TestLargeLogBuffers reads volumes that were unmounted after mounts with log buffers larger than
// the records in them.
func TestLargeLogBuffers(t *testing.T) {
	requireKernel(t)
	for _, size := range []string{"64k", "256k"} {
		img := newImage(t, 320)
		mounted(t, img, "logbsize="+size, func(dir string) { workload(newFiller(t, dir, 17), 300) })
		f := mustOpen(t, img)
		if f.Info().Log != diskfs.LogClean {
			t.Errorf("%s: log is %v, should be clean", size, f.Info().Log)
		}
		got := imageTree(t, f)
		var want map[string]file
		mounted(t, img, "ro", func(dir string) { want = kernelTree(t, dir) })
		compare(t, got, want)
	}
}

// TestReplayCopy takes the image away under a mounted file system that has come to
// rest, without syncing it.
func TestReplayCopy(t *testing.T) {
	requireKernel(t)
	img := newImage(t, 320)
	var copied string
	mounted(t, img, "", func(dir string) {
		p := newFiller(t, dir, 3)
		workload(p, 500)
		p.write("synced", p.bytes(10_000))
		f := p.open("synced")
		p.must(f.Sync()) // forces the log, and leaves metadata to be written later
		p.must(f.Close())
		copied = diskfstest.CopyInUse(t, img)
	})
	f := checkReplay(t, copied)
	inoOf(t, f, "synced")
}

// TestReplayShapes crashes after the tree of TestTree was made, so that each kind of
// metadata comes out of the log.
func TestReplayShapes(t *testing.T) {
	requireKernel(t)
	for _, c := range []struct {
		name  string
		mkfs  []string
		block int64
	}{
		{"default", nil, 4096},
		{"1k", []string{"-b", "size=1024"}, 1024},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			checkReplay(t, crashed(t, true, c.mkfs, nil, func(dir string) {
				p := newFiller(t, dir, 11)
				p.all(c.block, true)
				p.fragmentedDirs(500)
			}))
		})
	}
}

// TestReplayFreed frees directories and attributes whose blocks then hold the data of
// files: changes of those blocks in the log must not be applied to them.
func TestReplayFreed(t *testing.T) {
	requireKernel(t)
	checkReplay(t, crashed(t, true, nil, nil, func(dir string) {
		p := newFiller(t, dir, 12)
		for round := range 4 {
			p.many("gone", 800, 100)
			for i := range 60 {
				p.xattr("gone", fmt.Sprintf("user.%d", i), p.bytes(1500))
			}
			syncfs(t, dir)
			p.must(os.RemoveAll(p.path("gone")))
			syncfs(t, dir)
			for i := range 50 {
				name := fmt.Sprintf("data-%d-%d", round, i)
				p.write(name, p.bytes(40_000))
				f := p.open(name)
				p.must(f.Sync())
				p.must(f.Close())
			}
		}
	}))
}

// TestReplayGrown crashes after the file system was made larger.
func TestReplayGrown(t *testing.T) {
	requireKernel(t)
	img := newImage(t, 320)
	if err := os.Truncate(img, 900<<20); err != nil {
		t.Fatal(err)
	}
	mounted(t, img, "", func(dir string) {
		run(t, "xfs_growfs", dir)
		p := newFiller(t, dir, 13)
		for i := range 100 { // directories go into different groups
			p.mkdir(fmt.Sprintf("d%d", i))
			p.write(fmt.Sprintf("d%d/f", i), p.bytes(20_000))
		}
		shutdown(t, dir, true)
	})
	f := checkReplay(t, img)
	if size := f.Info().Size; size < 800<<20 {
		t.Errorf("the file system spans %d bytes after it grew", size)
	}
}

// TestStale opens an image with a dirty log as it is on disk.
func TestStale(t *testing.T) {
	requireKernel(t)
	img := crashed(t, true, nil, nil, func(dir string) {
		newFiller(t, dir, 14).many("d", 300, 10)
	})
	f, err := openImage(t, img, diskfs.Options{Stale: true})
	if err != nil {
		t.Fatal(err)
	}
	if f.Info().Log != diskfs.LogIgnored {
		t.Errorf("log is %v, should have been ignored", f.Info().Log)
	}
	if tree := imageTree(t, f); len(tree) != 1 {
		t.Errorf("%d entries; this file system never wrote any in place", len(tree)-1)
	}
	if tree := imageTree(t, mustOpen(t, img)); len(tree) != 302 {
		t.Errorf("%d entries after replay, want 302", len(tree))
	}
}

// TestDamagedLog refuses a log that is damaged in its middle, and opens it stale.
func TestDamagedLog(t *testing.T) {
	requireKernel(t)
	img := crashed(t, true, nil, nil, func(dir string) {
		newFiller(t, dir, 15).many("d", 8000, 100)
	})
	clean := mustOpen(t, img)
	l, err := clean.newLogRing()
	if err != nil {
		t.Fatal(err)
	}
	clean.dev.over = nil
	ends, err := l.findEnds()
	if err != nil {
		t.Fatal(err)
	}
	if used := ends.head - ends.tail; used < inFlightSectors {
		t.Fatalf("%d sectors of log, the test needs more", used)
	}
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	at := l.start + int64(ends.tail+inFlightSectors/2)*sector + 100
	if _, err := f.WriteAt([]byte("damage"), at); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = openImage(t, img, diskfs.Options{})
	if !errors.Is(err, diskfs.ErrDirtyLog) || !errors.Is(err, diskfs.ErrCorrupt) {
		t.Errorf("error %v", err)
	}
	if _, err := openImage(t, img, diskfs.Options{Stale: true}); err != nil {
		t.Errorf("opened stale: %v", err)
	}
}

// TestSparseInodes breaks free space into pieces too small for whole chunks of inodes,
// so that chunks with holes are made, and crashes.
func TestSparseInodes(t *testing.T) {
	requireKernel(t)
	img := crashed(t, true, []string{"--unsupported", "-d", "agcount=1", "-i", "sparse=1"}, nil, func(dir string) {
		p := newFiller(t, dir, 16)
		f := p.open("filler")
		run(t, "xfs_io", "-x", "-c", "resblks 0", dir) // what is kept back has room for chunks
		var st unix.Statfs_t
		p.must(unix.Statfs(dir, &st))
		p.must(unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail-100)*st.Bsize))
		for off := int64(0); off < 6<<20; off += 48 << 10 {
			p.must(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, 24<<10))
		}
		p.must(f.Close())
		syncfs(t, dir)
		p.mkdir("d")
		for i := range 20_000 {
			if err := os.Symlink("t", p.path(fmt.Sprintf("d/%d", i))); err != nil {
				break // full
			}
		}
	})
	f := checkReplay(t, img)
	kernel := diskfstest.CopyImage(t, img)
	mounted(t, kernel, "", func(string) {})
	out := run(t, "xfs_db", "-r", "-c", "agi 0", "-c", "addr root", "-c", "p", kernel)
	if !regexp.MustCompile(`\[\d+,0x[0-9a-f]+,`).MatchString(out) { // startino, holemask
		t.Errorf("xfs_db shows no chunk with holes:\n%s", out)
	}
	if n := f.Info().Files; n < 1000 {
		t.Errorf("%d inodes in use", n)
	}
}

//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// commitJournal makes the kernel write the running transaction to the journal, and
// nothing else: unlike sync, which also writes blocks to their places.
func commitJournal(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "commit-marker"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// crash copies an image in use: what a power failure now would leave.
func crash(t *testing.T, image string) string {
	t.Helper()
	return diskfstest.CopyInUse(t, image)
}

// work changes a volume so that its journal holds all kinds of changes, with several
// commits: files made, removed, renamed, truncated; directories removed, whose
// blocks are revoked and used again for data.
func work(t *testing.T, dir string) {
	t.Helper()
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	for round := range 4 {
		sub := filepath.Join(dir, fmt.Sprintf("round%d", round))
		must(os.Mkdir(sub, 0o755))
		for i := range 120 {
			must(os.WriteFile(filepath.Join(sub, fmt.Sprintf("%s-%d", strings.Repeat("n", 100), i)), fmt.Appendf(nil, "round %d file %d", round, i), 0o644))
		}
		must(os.Symlink(strings.Repeat("s", 200), filepath.Join(sub, "link")))
		commitJournal(t, dir)
		if round > 0 {
			old := filepath.Join(dir, fmt.Sprintf("round%d", round-1))
			for i := range 60 {
				must(os.Remove(filepath.Join(old, fmt.Sprintf("%s-%d", strings.Repeat("n", 100), i))))
			}
			must(os.Rename(filepath.Join(old, "link"), filepath.Join(dir, fmt.Sprintf("moved%d", round))))
		}
		// A directory of several blocks comes and goes; then data takes its blocks.
		gone := filepath.Join(dir, "gone")
		must(os.Mkdir(gone, 0o755))
		for i := range 200 {
			must(os.WriteFile(filepath.Join(gone, fmt.Sprintf("%s%d", strings.Repeat("g", 200), i)), nil, 0o644))
		}
		commitJournal(t, dir)
		must(os.RemoveAll(gone))
		commitJournal(t, dir)
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("data%d", round)))
		must(err)
		for range 64 {
			// Begins with the journal's magic number: data=journal must escape it.
			block := append([]byte{0xc0, 0x3b, 0x39, 0x98}, make([]byte, 4092)...)
			block[100] = byte(round)
			_, err := f.Write(block)
			must(err)
		}
		must(f.Sync(), f.Truncate(100000), f.Close())
		commitJournal(t, dir)
	}
}

// dirtyJournal is a volume whose journal is replayed.
type dirtyJournal struct {
	name, args, mount string
	compat, incompat  uint32 // that the kernel gives the journal
	wraps             bool   // the log goes round its ring
}

// TestDirtyJournal compares a volume that was copied in use with what the kernel
// shows after replaying its journal.
func TestDirtyJournal(t *testing.T) {
	diskfstest.NeedRoot(t)
	const csumV3 = journalIncompatCsumV3 | journalIncompat64bit
	for _, c := range []dirtyJournal{
		{name: "v3", args: "-t ext4", incompat: csumV3},
		{name: "v3-wrap", args: "-t ext4 -b 1024 -J size=1", incompat: csumV3, wraps: true},
		{name: "v3-data", args: "-t ext4", mount: "data=journal", incompat: csumV3},
		{name: "none", args: "-t ext3"},
		{name: "none-data-1k", args: "-t ext3 -b 1024", mount: "data=journal"},
		{name: "none-64bit", args: "-t ext4 -O ^metadata_csum,64bit", incompat: journalIncompat64bit},
		{name: "v1", args: "-t ext4 -O ^metadata_csum,^64bit", mount: "journal_checksum", compat: journalCompatChecksum},
		{name: "v1-async", args: "-t ext4 -O ^metadata_csum,64bit", mount: "journal_async_commit,data=writeback",
			compat: journalCompatChecksum, incompat: journalIncompat64bit | journalIncompatAsyncCommit},
		{name: "inline", args: "-t ext4 -O inline_data,bigalloc -C 65536", incompat: csumV3},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			// The kernel writes changes to their places when they are half a minute old, or when
			// somebody calls sync: the journal of a copy made after that is not needed.
			for try := 1; !replaysDirtyJournal(t, c); try++ {
				if try == 5 {
					t.Fatal("the journal was not needed")
				}
				t.Log("the journal was not needed; once more")
			}
		})
	}
}

// replaysDirtyJournal reports whether the journal of a copy of a volume in use was needed.
func replaysDirtyJournal(t *testing.T, c dirtyJournal) bool {
	t.Helper()
	image := diskfstest.NewImage(t, 96<<20)
	mkfs(t, image, strings.Fields(c.args)...)
	// By default the kernel also commits what is five seconds old, and where the log goes round its ring would
	// depend on how long the work takes.
	dir, unmount := diskfstest.Mount(t, image, strings.Trim(c.mount+",commit=3600", ","))
	work(t, dir)
	dirty := crash(t, image)
	unmount()

	// Without replay the state must differ, and say so.
	r, size := diskfstest.Open(t, dirty)
	stale, err := Open(r, size, diskfs.Options{Stale: true})
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := diskfs.New(stale).ReadDir("."); err == nil && len(entries) > 10 {
		return false
	}
	if stale.Info().Log != diskfs.LogIgnored {
		t.Errorf("log %v, want ignored", stale.Info().Log)
	}
	replayed := diskfstest.CopyImage(t, dirty)
	f := compareWithKernel(t, dirty, replayed, diskfstest.Options{})
	if f.Info().Log != diskfs.LogReplayed {
		t.Errorf("log %v, want replayed", f.Info().Log)
	}
	t.Logf("%d blocks in the journal", len(f.dev.over))
	if len(f.dev.over) == 0 {
		t.Error("the journal holds nothing: the test proves nothing")
	}
	journalIno, err := stale.inode(uint64(stale.sb.journalIno))
	if err != nil {
		t.Fatal(err)
	}
	j := &journal{fs: stale, file: journalIno}
	if err := j.readSuperblock(); err != nil {
		t.Fatal(err)
	}
	// The feature "revoke" reaches the journal's superblock late.
	if j.compat != c.compat || j.incompat&^journalIncompatRevoke != c.incompat {
		t.Errorf("journal features compat %#x incompat %#x, want %#x %#x", j.compat, j.incompat, c.compat, c.incompat)
	}
	first, err := j.position(j.start)
	if err != nil {
		t.Fatal(err)
	}
	wraps := false
	for _, b := range f.dev.over {
		wraps = wraps || b.pos < first
	}
	if c.wraps && !wraps {
		t.Error("the log does not go round its ring")
	}
	return true
}

// TestWrittenJournal replays journals that debugfs wrote: with checksums v2, which
// kernels of today read but no longer write, and with revoked blocks.
func TestWrittenJournal(t *testing.T) {
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "debugfs")
	for _, c := range []struct{ name, args, open string }{
		{"v2", "-t ext4", "jo -c -v 2"},
		{"v2-32bit", "-t ext4 -O ^64bit", "jo -c -v 2"},
		{"v3", "-t ext4", "jo -c -v 3"},
		{"plain", "-t ext4 -O ^metadata_csum,^64bit", "jo"},
	} {
		t.Run(c.name, func(t *testing.T) {
			image := diskfstest.NewImage(t, 32<<20)
			src := t.TempDir()
			if err := os.WriteFile(filepath.Join(src, "file"), bytes.Repeat([]byte("o"), 40960), 0o644); err != nil {
				t.Fatal(err)
			}
			mkfs(t, image, append(strings.Fields(c.args), "-d", src)...)
			var blocks [10]int64
			_, fsys := openImage(t, image)
			file, err := fsys.Open("file")
			if err != nil {
				t.Fatal(err)
			}
			e, err := file.(diskfs.File).NextData(0)
			if err != nil || e.Length != 40960 {
				t.Fatalf("extent %+v, %v", e, err)
			}
			for i := range blocks {
				blocks[i] = e.Device/4096 + int64(i)
			}
			logged := filepath.Join(src, "logged")
			write := func(letter string) string {
				name := logged + letter
				body := strings.Repeat(letter, 4096*10)
				if letter == "m" { // looks like a block of the journal
					body = strings.Repeat("\xc0\x3b\x39\x98"+strings.Repeat("m", 4092), 10)
				}
				if err := os.WriteFile(name, []byte(body), 0o644); err != nil {
					t.Fatal(err)
				}
				return name
			}
			list := func(from, to int) string {
				return fmt.Sprintf("%d-%d", blocks[from], blocks[to])
			}
			script := strings.Join([]string{
				c.open,
				"jw -b " + list(0, 9) + " " + write("a"), // all
				"jw -r " + list(2, 3) + " " + os.DevNull, // 2, 3 taken back
				"jw -b " + list(3, 4) + " " + write("m"), // 3, 4 again
				"jw -r " + list(5, 5) + " " + os.DevNull, // 5 taken back
				"jc",
			}, "\n") + "\n"
			scriptFile := filepath.Join(src, "script")
			if err := os.WriteFile(scriptFile, []byte(script), 0o644); err != nil {
				t.Fatal(err)
			}
			t.Log(diskfstest.Run(t, "debugfs", "-w", "-f", scriptFile, image))
			f, fsys := openImage(t, image)
			if f.Info().Log != diskfs.LogReplayed {
				t.Fatalf("log %v, want replayed", f.Info().Log)
			}
			got, err := fsys.ReadFile("file")
			if err != nil {
				t.Fatal(err)
			}
			dir, _ := diskfstest.Mount(t, diskfstest.CopyImage(t, image), "ro")
			want, err := os.ReadFile(filepath.Join(dir, "file"))
			if err != nil {
				t.Fatal(err)
			}
			for i := range blocks {
				g, w := got[i*4096:(i+1)*4096], want[i*4096:(i+1)*4096]
				if string(g) != string(w) {
					t.Errorf("block %d: %x…%x, kernel %x…%x", i, g[:8], g[4090:], w[:8], w[4090:])
				}
			}
			if want[0] != 'a' || want[2*4096] == 'a' || want[3*4096] != 0xc0 || want[5*4096] == 'a' {
				t.Errorf("the journal does not hold what the test meant: %x %x %x %x", want[0], want[2*4096], want[3*4096], want[5*4096])
			}
		})
	}
}

// TestFastCommit refuses a journal with fast commits, by name.
func TestFastCommit(t *testing.T) {
	diskfstest.NeedRoot(t)
	// Fast commits do not count after a whole one, which the kernel makes also when another process calls sync.
	for try := 1; !refusesFastCommits(t); try++ {
		if try == 5 {
			t.Fatal("a journal with fast commits is not refused, or there were none")
		}
		t.Log("the journal was opened; once more")
	}
}

// refusesFastCommits reports whether the volume of a copy in use was refused.
func refusesFastCommits(t *testing.T) bool {
	t.Helper()
	image := diskfstest.NewImage(t, 64<<20)
	mkfs(t, image, "-t", "ext4", "-O", "fast_commit")
	// By default the kernel makes a whole commit of what is five seconds old.
	dir, unmount := diskfstest.Mount(t, image, "commit=3600")
	// A whole commit, then fast ones.
	commitJournal(t, dir)
	for i := range 3 {
		name := filepath.Join(dir, fmt.Sprintf("fast%d", i))
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(name); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	dirty := crash(t, image)
	unmount()

	r, size := diskfstest.Open(t, dirty)
	_, err := Open(r, size, diskfs.Options{})
	if err == nil {
		return false
	}
	if !errors.Is(err, diskfs.ErrUnsupported) || !errors.Is(err, diskfs.ErrDirtyLog) || !strings.Contains(err.Error(), "fast_commit") {
		t.Errorf("open: %v", err)
	}
	if f, err := Open(r, size, diskfs.Options{Stale: true}); err != nil || f.Info().Log != diskfs.LogIgnored {
		t.Errorf("open stale: %v", err)
	}
	// After unmounting, the feature is no hindrance.
	_, fsys := openImage(t, image)
	if _, err := fsys.Stat("fast2"); err != nil {
		t.Error(err)
	}
	if _, err := fsys.Stat("fast3"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	return true
}

// TestExternalJournal refuses a volume whose changes are on another device, by name.
func TestExternalJournal(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	image := diskfstest.NewImage(t, 16<<20)
	mkfs(t, image, "-t", "ext4", "-O", "^has_journal")
	diskfstest.Run(t, "debugfs", "-w", "-R", "feature has_journal needs_recovery", image)
	r, size := diskfstest.Open(t, image)
	_, err := Open(r, size, diskfs.Options{})
	if !errors.Is(err, diskfs.ErrUnsupported) || !errors.Is(err, diskfs.ErrDirtyLog) || !strings.Contains(err.Error(), "external journal") {
		t.Errorf("open: %v", err)
	}
	journal := diskfstest.NewImage(t, 16<<20)
	mkfs(t, journal, "-O", "journal_dev")
	r, size = diskfstest.Open(t, journal)
	if _, err := Open(r, size, diskfs.Options{}); !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(err.Error(), "journal_dev") {
		t.Errorf("open journal device: %v", err)
	}
}

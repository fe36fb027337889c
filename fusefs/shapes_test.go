package fusefs_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// mkXFSShapes uses blocks of 1 KiB, with which directories and files take their large forms
// early.
var mkXFSShapes = []string{"mkfs.xfs", "-q", "-b", "size=1024", "-m", "reflink=1", "-i", "size=512"}

// shapeXFS fills a mounted XFS with directories of every form, files whose extents need a
// tree, and files that share blocks; and checks that by xfs_db.
func shapeXFS(t testing.TB, image string) {
	t.Helper()
	diskfstest.NeedTool(t, "xfs_db")
	dir, unmount := diskfstest.Mount(t, image, "")
	p := func(name string) string { return filepath.Join(dir, name) }
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	fill := func(name string, n, pad int) {
		t.Helper()
		must(os.MkdirAll(p(name), 0o755))
		for i := range n {
			must(os.Symlink("t", p(fmt.Sprintf("%s/%06d%s", name, i, strings.Repeat("x", pad)))))
		}
	}
	fill("dir-short", 3, 1)
	fill("dir-block", 40, 1)
	fill("dir-leaf", 300, 20)
	fill("dir-node", 1500, 20)
	must(os.Mkdir(p("dir-btree"), 0o755), os.Mkdir(p("other"), 0o755))
	for i := range 1000 { // alternating, so that neither file gets consecutive blocks
		for _, d := range []string{"dir-btree", "other"} {
			must(os.Symlink("t", p(fmt.Sprintf("%s/%06d%s", d, i, strings.Repeat("y", 230)))))
		}
	}
	block := make([]byte, 1024)
	pieces, err := os.Create(p("extents-btree"))
	must(err)
	for i := range int64(1200) {
		block[0], block[1] = byte(i), byte(i>>8)
		_, err := pieces.WriteAt(block, i*2048)
		must(err)
	}
	must(pieces.Close(), os.WriteFile(p("clone-a"), []byte(strings.Repeat("shared ", 20_000)), 0o644))
	a, err := os.OpenFile(p("clone-a"), os.O_RDWR, 0)
	must(err)
	b, err := os.Create(p("clone-b"))
	must(err)
	must(unix.IoctlFileClone(int(b.Fd()), int(a.Fd())))
	_, err = b.WriteAt([]byte("changed in the copy"), 50_000)
	must(err)
	_, err = a.WriteAt([]byte("changed in the first"), 90_000)
	must(err, a.Close(), b.Close())
	inodes := map[string]uint64{}
	for _, name := range []string{"dir-short", "dir-block", "dir-leaf", "dir-node", "dir-btree", "extents-btree", "clone-b"} {
		var st unix.Stat_t
		must(unix.Lstat(p(name), &st))
		inodes[name] = st.Ino
	}
	unmount()
	// The form of a directory's index shows in the first block at 32 GiB of its space.
	const index = 32 << 30 / 1024
	for name, want := range map[string]string{
		"dir-short": `core\.format = 1 `, "dir-block": `core\.nextents = [1-4]\n`, "dir-leaf": `hdr\.magic = 0x3df1`,
		"dir-node": `hdr\.magic = 0x3ebe`, "dir-btree": `core\.format = 3 `, "extents-btree": `core\.format = 3 `, "clone-b": `v3\.reflink = 1\n`,
	} {
		commands := []string{"-r", "-c", fmt.Sprintf("inode %d", inodes[name]), "-c", "print"}
		if strings.Contains(want, "magic") {
			commands = append(commands, "-c", fmt.Sprintf("dblock %d", index), "-c", "print")
		}
		if out := diskfstest.Run(t, "xfs_db", append(commands, image)...); !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("%s is not as the test needs it: no %s in\n%.3000s", name, want, out)
		}
	}
}

// A disk with sectors of 4 KiB has its GPT at another offset, and counts in such sectors.
func TestGPTWithLargeSectors(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedTool(t, "sfdisk")
	ext := newVolume(t, 64*mib, append(mkExt4, "-b", "4096"), 20)
	image := diskfstest.NewImage(t, 128*mib)
	table := filepath.Join(t.TempDir(), "table")
	if err := os.WriteFile(table, []byte("label: gpt\nstart=256,size=4096\nstart=8192,size=16384\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "sh", "-c", `set -e
loop=$(losetup --find --show --sector-size 4096 "$1")
trap 'losetup --detach $loop' EXIT
test "$(blockdev --getss $loop)" = 4096
sfdisk -q --no-reread --no-tell-kernel $loop <"$2" >&2`, "sh", image, table)
	diskfstest.Run(t, "dd", "if="+ext, "of="+image, "bs=1M", "seek=32", "conv=notrunc,sparse", "status=none")
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{})
	if got := names(t, m.latest(shopDB, "files")); strings.Join(got, " ") != "p1 p2" {
		t.Fatalf("the disk holds %q", got)
	}
	want, _ := diskfstest.Mount(t, ext, "ro")
	diskfstest.CompareDirs(t, m.latest(shopDB, "files/p2"), want, through)
}

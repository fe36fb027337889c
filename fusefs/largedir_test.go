package fusefs_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// A directory with more than maxAhead entries is listed completely, and each of its files can
// be opened.
func TestLargeDirectory(t *testing.T) {
	diskfstest.NeedRoot(t)
	const files = 17_000
	image := diskfstest.NewImage(t, 64*mib)
	diskfstest.Run(t, "mkfs.ext4", "-q", "-F", "-N", "18000", image)
	dir, unmount := diskfstest.Mount(t, image, "")
	for i := range files {
		if err := unix.Mknod(filepath.Join(dir, fmt.Sprintf("file-%05d", i)), unix.S_IFREG|0o600, 0); err != nil {
			t.Fatal(err)
		}
	}
	unmount()
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
	m := mount(t, repo, fusefs.Options{})
	entries, err := os.ReadDir(m.latest(shopDB, "files"))
	if err != nil || len(entries) != files+1 { // and lost+found
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	for i, e := range entries {
		if i%50 > 0 {
			continue
		}
		if info, err := e.Info(); err != nil || info.Name() != e.Name() || info.IsDir() != e.IsDir() {
			t.Errorf("%s: %v, %v", e.Name(), info, err)
		}
	}
}

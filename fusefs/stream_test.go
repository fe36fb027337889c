package fusefs_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"testing"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
)

// A stream is one read-only file, and has no files/.
func TestStreamInTheTree(t *testing.T) {
	t.Parallel()
	needFUSE(t)
	repo := repotest.New(t).Open(t)
	v := points.Volume{Namespace: "shop", Name: "dump", Cluster: shopDB.Cluster}
	var want []byte
	for i := range 100_000 {
		want = fmt.Appendf(want, "insert into orders values (%d);\n", i)
	}
	if _, _, err := backup.RunStream(t.Context(), repo, backup.StreamOptions{Volume: v, Reader: bytes.NewReader(want)}); err != nil {
		t.Fatal(err)
	}
	m := mount(t, repo, fusefs.Options{Writable: true, OverlayDir: t.TempDir()})
	got, err := os.ReadFile(m.latest(v, "stream"))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(want), err)
	}
	entries, err := os.ReadDir(m.latest(v, ""))
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	if err != nil || !slices.Equal(names, []string{"info.json", "stream"}) {
		t.Errorf("the directory has %v, %v", names, err)
	}
	for _, name := range []string{"disk.img", "files"} {
		if _, err := os.Stat(m.latest(v, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.OpenFile(m.latest(v, "stream"), os.O_WRONLY, 0); !errors.Is(err, syscall.EROFS) {
		t.Errorf("opened for writing: %v", err)
	}
	if i := m.info(t, v); i.Size != int64(len(want)) {
		t.Errorf("info %+v", i)
	}
}

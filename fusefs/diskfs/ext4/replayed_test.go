//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestReplayedContent: content that the journal has lies nowhere on the volume.
func TestReplayedContent(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	image, src := diskfstest.NewImage(t, 32<<20), t.TempDir()
	for _, name := range []string{"first", "last", "other"} {
		if err := os.WriteFile(filepath.Join(src, name), bytes.Repeat([]byte("o"), 40960), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	mkfs(t, image, "-t", "ext4", "-d", src)
	place := func(name string) diskfs.Extent {
		t.Helper()
		_, fsys := openImage(t, image)
		f, err := fsys.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		e, err := f.(diskfs.File).NextData(0)
		if err != nil || e.Length != 40960 {
			t.Fatalf("%s: %+v, %v", name, e, err)
		}
		return e
	}
	first, last := place("first").Device/4096, place("last").Device/4096+9
	body, script := filepath.Join(src, "body"), filepath.Join(src, "script")
	if err := errors.Join(os.WriteFile(body, bytes.Repeat([]byte("j"), 4096), 0o644),
		os.WriteFile(script, fmt.Appendf(nil, "jo -c\njw -b %d %s\njw -b %d %s\njc\n", first, body, last, body), 0o644)); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "debugfs", "-w", "-f", script, image)
	_, fsys := openImage(t, image)
	for name, at := range map[string]int{"first": 0, "last": 36864, "other": -1} {
		want := []byte(strings.Repeat("o", 40960))
		if at >= 0 {
			copy(want[at:], strings.Repeat("j", 4096))
		}
		if b, err := fsys.ReadFile(name); err != nil || !bytes.Equal(b, want) {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
		if e := place(name); (e.Device < 0) != (at >= 0) {
			t.Errorf("%s lies at %+v", name, e)
		}
	}
}

// TestManyRevokes reads a journal that revokes too many blocks.
func TestManyRevokes(t *testing.T) {
	s := &scan{journal: &journal{}, maxRevokes: 10_000}
	b := make([]byte, 4096)
	be.PutUint32(b[journalHeader:], uint32(len(b)))
	for range 20 { // of 1,020 blocks each
		if err := s.revoke(b, ""); err != nil {
			if !errors.Is(err, diskfs.ErrUnsupported) || len(s.revokes) != s.maxRevokes {
				t.Errorf("after %d: %v", len(s.revokes), err)
			}
			return
		}
	}
	t.Errorf("%d are not refused", len(s.revokes))
}

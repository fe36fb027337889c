package disk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestTargetReadsTheDisk: with or without direct I/O, reading back must not be served
// by the page cache.
func TestTargetReadsTheDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new.img")
	target := openTarget(t, path, TargetOptions{Size: 1 << 20, Buffered: true})

	if _, err := target.WriteAt(random(1<<20, 1), 0); err != nil {
		t.Fatal(err)
	}

	if !resident(t, path) {
		t.Fatal("a buffered write left nothing in the page cache: this test sees nothing")
	}

	if err := target.dropCache(1000, 1); err != nil {
		t.Fatal(err)
	}

	if resident(t, path) {
		t.Error("the pages are still in the page cache, and ReadAt would read them")
	}
}

// TestTargetReadsTheDeviceAsItIs changes the file under a loop device without its page cache.
func TestTargetReadsTheDeviceAsItIs(t *testing.T) {
	for _, buffered := range []bool{false, true} {
		path := tempFile(t, make([]byte, 1<<20))
		target := openTarget(t, loop(t, path), TargetOptions{Size: 1 << 20, Buffered: buffered})
		p := random(4096, 1)

		if _, err := target.WriteAt(p, 8192); err != nil {
			t.Fatal(err)
		}

		if err := target.Sync(); err != nil {
			t.Fatal(err)
		}

		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}

		if _, err := f.WriteAt([]byte{p[100] ^ 0xff}, 8192+100); err != nil {
			t.Fatal(err)
		}

		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}

		got := AlignedBuffer(4096)
		if _, err := target.ReadAt(got, 8192); err != nil {
			t.Fatal(err)
		}

		if bytes.Equal(got, p) {
			t.Errorf("buffered %v: ReadAt gave what was written, not what the disk holds", buffered)
		}
	}
}

// TestTargetReadsBeforeFit: a read before Fit sees what Fit will leave, and does not change
// the file.
func TestTargetReadsBeforeFit(t *testing.T) {
	const size = 1<<20 + 100

	for _, had := range []int64{0, 1, 300_001, 512 << 10, size - 1, size, size + 1, 3 << 20} {
		for _, buffered := range []bool{false, true} {
			old := random(had, 7)
			path := tempFile(t, old)
			target := openTarget(t, path, TargetOptions{Size: size, Keep: true, Buffered: buffered})

			want := make([]byte, size)
			copy(want, old)
			checkReads(t, target, want)

			if info, err := os.Stat(path); err != nil || info.Size() != had {
				t.Fatalf("%d bytes: reading left %v, %v", had, info.Size(), err)
			}

			if err := target.Fit(); err != nil {
				t.Fatal(err)
			}

			checkReads(t, target, want)
		}
	}
}

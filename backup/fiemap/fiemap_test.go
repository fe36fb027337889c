package fiemap

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzParse takes answers of a file system: ranges follow each other, within the file.
func FuzzParse(f *testing.F) {
	extent := func(off, place, length uint64, flags uint32) []byte {
		b := make([]byte, extentSize)
		binary.NativeEndian.PutUint64(b, off)
		binary.NativeEndian.PutUint64(b[8:], place)
		binary.NativeEndian.PutUint64(b[16:], length)
		binary.NativeEndian.PutUint32(b[40:], flags)
		return b
	}
	f.Add(uint32(0), []byte{})
	f.Add(uint32(1), extent(0, 4096, 8192, extentLast))
	f.Add(uint32(2), append(extent(4096, 4096, 4096, extentShared), extent(16384, 0, 1<<40, extentUnwritten)...))
	f.Add(uint32(1), extent(1<<63, 0, 1, 0))
	f.Fuzz(func(t *testing.T, n uint32, extents []byte) {
		buf := make([]byte, headSize, headSize+len(extents))
		binary.NativeEndian.PutUint32(buf[20:], n)
		r := newReader(nil, 1<<20)
		r.next = 4096
		if r.parse(append(buf, extents...)) != nil {
			return
		}
		at := r.next
		for _, x := range r.pending {
			if x.Offset != at || x.Length <= 0 || x.Offset+x.Length > r.size || x.Place < 0 {
				t.Fatalf("range %+v follows %d", x, at)
			}
			at += x.Length
		}
		if at == r.next && !r.last {
			t.Fatal("an answer of nothing is not the last")
		}
	})
}

// TestCloneRefused has a file system without reflinks.
func TestCloneRefused(t *testing.T) {
	dir := "/dev/shm" // tmpfs
	if _, err := os.Stat(dir); err != nil {
		t.Skip("there is no tmpfs at /dev/shm")
	}
	dir, err := os.MkdirTemp(dir, "fiemap-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	from, err := os.Create(filepath.Join(dir, "from"))
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.Create(filepath.Join(dir, "to"))
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if err := Clone(to, from); !errors.Is(err, ErrNoClones) {
		t.Errorf("Clone = %v, want %v", err, ErrNoClones)
	}
}

// TestParse is what a file system says of extents, by its flags.
func TestParse(t *testing.T) {
	for flags, want := range map[uint32]Kind{
		extentLast: Stored, extentShared | extentMerged: Stored, extentUnwritten | extentShared: Hole,
		0x2: Unclear, 0x4: Unclear, 0x8: Unclear, 0x80: Unclear, 0x100: Unclear, 0x200: Unclear, 0x400: Unclear, // up to DATA_TAIL
		extentUnwritten | 0x4: Unclear,
	} {
		buf := make([]byte, headSize+extentSize)
		ne := binary.NativeEndian
		ne.PutUint32(buf[20:], 1)
		e := buf[headSize:]
		ne.PutUint64(e, 4096)
		ne.PutUint64(e[8:], 1<<20)
		ne.PutUint64(e[16:], 8192)
		ne.PutUint32(e[40:], flags)
		r := newReader(nil, 8192)
		if err := r.parse(buf); err != nil || len(r.pending) != 2 {
			t.Fatalf("flags %#x: %+v, %v", flags, r.pending, err)
		}
		x := r.pending[1]
		if r.pending[0] != (Range{Length: 4096}) || x.Kind != want || x.Shared != (want == Stored && flags&extentShared != 0) || x.Offset != 4096 || x.Length != 4096 || (want == Stored) != (x.Place == 1<<20) {
			t.Errorf("flags %#x: %+v, want kind %d", flags, r.pending, want)
		}
	}
}

// TestChangedUnshared has answers for a file and its clone that name the same places. Only shared
// ones say that nothing was written.
func TestChangedUnshared(t *testing.T) {
	answer := func(flags uint32) *reader {
		buf := make([]byte, headSize+2*extentSize)
		ne := binary.NativeEndian
		ne.PutUint32(buf[20:], 2)
		for i, off := range []uint64{0, 8192} { // the answers of an SMB server have the offsets as places
			e := buf[headSize+i*extentSize:]
			ne.PutUint64(e, off)
			ne.PutUint64(e[8:], off)
			ne.PutUint64(e[16:], 4096)
			ne.PutUint32(e[40:], flags|uint32(i)*extentLast)
		}
		r := newReader(nil, 16384)
		if err := r.parse(buf); err != nil {
			t.Fatal(err)
		}
		return r
	}
	for _, c := range []struct {
		base, now uint32
		want      []int64 // offsets
	}{
		{0, 0, []int64{0, 8192}}, {extentShared, 0, []int64{0, 8192}}, {0, extentShared, []int64{0, 8192}}, {extentShared, extentShared, nil},
	} {
		var got []int64
		err := changed(answer(c.base), answer(c.now), func(off, length int64, zero bool) error {
			if length != 4096 || zero {
				t.Errorf("%d bytes at %d, zero %v", length, off, zero)
			}
			got = append(got, off)
			return nil
		})
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("flags %#x and %#x: changed at %v, %v; want %v", c.base, c.now, got, err, c.want)
		}
	}
}

// TestReportsSharing takes file systems that clone files for ones to track by, or not.
func TestReportsSharing(t *testing.T) {
	for magic, want := range map[uint32]bool{
		unix.XFS_SUPER_MAGIC: true, unix.BTRFS_SUPER_MAGIC: true, unix.OVERLAYFS_SUPER_MAGIC: true,
		unix.SMB2_SUPER_MAGIC: false, unix.CIFS_SUPER_MAGIC: false, unix.NFS_SUPER_MAGIC: false, 0x2fc12fc1: false, // ZFS
	} {
		if got := reportsSharing(magic); got != want {
			t.Errorf("%#x: %v", magic, got)
		}
	}
}

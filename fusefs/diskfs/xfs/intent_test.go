package xfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// A crash between the transactions of one operation is rare, and no workload meets it
// by plan. So these tests write the log record of one themselves, after the end of a
// clean log, and let the kernel replay it too.

// patchImage changes n bytes of an image at off.
func patchImage(t testing.TB, img string, off int64, n int, change func(b []byte)) {
	t.Helper()
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	change(b)
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// patchSuperblock changes the superblock and its checksum.
func patchSuperblock(t testing.TB, img string, change func(b []byte)) {
	t.Helper()
	patchImage(t, img, 0, 512, func(b []byte) {
		change(b)
		binary.LittleEndian.PutUint32(b[sbOffCRC:], checksum(b, sbOffCRC))
	})
}

func setBits(b []byte, off int, bits uint32) {
	binary.BigEndian.PutUint32(b[off:], be32(b, off)|bits)
}

const (
	sbOffIncompat    = 216
	sbOffLogIncompat = 220
)

// operation encodes one operation of a transaction.
func operation(flags byte, data []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x1234) // transaction
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(append(b, clientTransaction, flags, 0, 0), data...)
}

// appendRecord writes a record with one transaction of items, each a list of regions,
// to the end of a clean log.
func appendRecord(t testing.TB, img string, items ...[][]byte) {
	t.Helper()
	f := mustOpen(t, img)
	l, err := f.newLogRing()
	if err != nil {
		t.Fatal(err)
	}
	ends, err := l.findEnds()
	if err != nil || !ends.clean {
		t.Fatal(ends, err)
	}
	last, ok, err := l.lastRecord(ends.head, l.n)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	cycle := uint32(last.lsn >> 32)

	header := make([]byte, transHeaderSize)
	binary.LittleEndian.PutUint32(header, transHeaderMagic)
	header[4], header[12] = 40, byte(len(items))
	ops := [][]byte{operation(opStart, nil), operation(0, header)}
	for _, it := range items {
		for _, region := range it {
			ops = append(ops, operation(0, region))
		}
	}
	ops = append(ops, operation(opCommit, nil))
	data := bytes.Join(ops, nil)
	length := (len(data) + 7) &^ 7
	data = append(data, make([]byte, (length+sector-1)/sector*sector-len(data))...)

	rec := make([]byte, sector)
	be := binary.BigEndian
	be.PutUint32(rec, recordMagic)
	be.PutUint32(rec[recOffCycle:], cycle)
	be.PutUint32(rec[recOffVersion:], 2)
	be.PutUint32(rec[recOffLen:], uint32(length))
	lsn := uint64(cycle)<<32 | uint64(ends.head)
	be.PutUint64(rec[recOffLSN:], lsn)
	be.PutUint64(rec[recOffTail:], lsn)
	be.PutUint32(rec[36:], uint32(last.blk))
	be.PutUint32(rec[recOffOps:], uint32(len(ops)))
	be.PutUint32(rec[recOffFormat:], formatLinuxLE)
	copy(rec[recOffUUID:], f.sb.uuid[:])
	be.PutUint32(rec[recOffSize:], cycleDataBytes)
	for j := range len(data) / sector {
		copy(rec[recOffCycleData+j*4:], data[j*sector:j*sector+4])
		be.PutUint32(data[j*sector:], cycle)
	}
	binary.LittleEndian.PutUint32(rec[recOffCRC:], crcUpdate(checksum(rec[:recChecksummed], recOffCRC), data[:length]))
	all := append(rec, data...)
	if ends.head+len(all)/sector >= l.n {
		t.Fatal("the record would wrap")
	}
	patchImage(t, img, l.start+int64(ends.head)*sector, len(all), func(b []byte) { copy(b, all) })
}

// le encodes numbers in the order of the log, each with its size.
func le(parts ...any) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		if err := binary.Write(&b, binary.LittleEndian, p); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}

func bui(id uint64, typ uint32, ino uint64, e extent) []byte {
	if e.unwritten {
		typ |= bmapUnwritten
	}
	return le(uint16(itemBUI), uint16(1), uint32(1), id, ino, e.start, e.off, uint32(e.n), typ)
}

func firstExtent(t testing.TB, f *FS, path string) (uint64, extent) {
	t.Helper()
	ino := inoOf(t, f, path)
	i, err := f.inode(ino)
	if err != nil {
		t.Fatal(err)
	}
	e, ok, err := i.data.find(0)
	if err != nil || !ok {
		t.Fatal(path, ok, err)
	}
	return ino, e
}

func TestUnfinishedMappings(t *testing.T) {
	requireKernel(t)
	img := newImage(t, 320)
	mounted(t, img, "", func(dir string) {
		p := newFiller(t, dir, 21)
		p.write("a", p.bytes(64<<10))
		p.write("b", p.bytes(5000))
		p.writeAt("b", p.bytes(5000), 1<<20)
		p.manyExtents("tree", 200, 4096)
		p.mkdir("dir")
	})
	f := mustOpen(t, img)
	a, ea := firstExtent(t, f, "a")
	b, _ := firstExtent(t, f, "b")
	tree, et := firstExtent(t, f, "tree")
	appendRecord(t, img,
		// The middle of a goes away, and turns up in b; of the tree's file a block does.
		[][]byte{bui(1, bmapUnmap, a, extent{off: 5, start: ea.start + 5, n: 3})},
		[][]byte{bui(2, bmapMap, b, extent{off: 100, start: ea.start + 5, n: 3})},
		[][]byte{bui(3, bmapUnmap, tree, et)},
		[][]byte{bui(4, bmapMap, tree, extent{off: 10, start: et.start, n: 1})},
		// This one was finished.
		[][]byte{bui(5, bmapUnmap, a, extent{off: 0, start: ea.start, n: 1})},
		[][]byte{le(uint16(itemBUD), uint16(1), uint32(0), uint64(5))},
	)
	got := checkReplay(t, img)
	i := mustInode(t, got, "a")
	if e, ok, err := i.data.find(5); err != nil || !ok || e.off != 8 {
		t.Errorf("a maps %+v after block 5 (%v, %v)", e, ok, err)
	}
}

func TestUnfinishedAttributes(t *testing.T) {
	requireKernel(t)
	img := newImage(t, 320)
	mounted(t, img, "", func(dir string) {
		p := newFiller(t, dir, 22)
		p.write("a", nil)
		p.xattr("a", "user.old", []byte("old"))
		p.xattr("a", "user.gone", []byte("gone"))
		p.write("b", nil)
	})
	f := mustOpen(t, img)
	a, b := inoOf(t, f, "a"), inoOf(t, f, "b")
	attri := func(id, ino uint64, op uint32, flags uint32, name, value string) [][]byte {
		regions := uint16(2)
		if value != "" {
			regions = 3
		}
		pad := func(s string) []byte { return append([]byte(s), make([]byte, (4-len(s)%4)%4)...) }
		it := [][]byte{le(uint16(itemATTRI), regions, uint32(0), id, ino, op, uint32(len(name)), uint32(len(value)), flags), pad(name)}
		if value != "" {
			it = append(it, pad(value))
		}
		return it
	}
	patchSuperblock(t, img, func(b []byte) { setBits(b, sbOffLogIncompat, logIncompatXattr) })
	appendRecord(t, img,
		attri(1, a, attriRemove, 0, "gone", ""),
		attri(2, a, attriReplace, 0, "old", "new value"),
		attri(3, b, attriSet, attrRoot, "set", "in trusted"),
		attri(4, b, attriSet, 0, "large", strings.Repeat("large", 800)),
		attri(5, b, attriSet, 0, "done", "x"),
		[][]byte{le(uint16(itemATTRD), uint16(1), uint32(0), uint64(5))},
	)
	// The kernel does one transaction per intent and needs them in order; what it
	// shows of b's blocks is beyond what is promised here.
	got := mustOpen(t, img)
	var want, have string
	kernel := diskfstest.CopyImage(t, img)
	mounted(t, kernel, "", func(dir string) { want = kernelXattrs(t, dir+"/a") + "; " + kernelXattrs(t, dir+"/b") })
	for _, path := range []string{"a", "b"} {
		xs, err := mustInode(t, got, path).Xattrs()
		if err != nil {
			t.Fatal(err)
		}
		have += xattrString(xs)
		if path == "a" {
			have += "; "
		}
	}
	if have != want {
		t.Errorf("attributes\n got %s\nwant %s", have, want)
	}
}

func TestUnfinishedExchange(t *testing.T) {
	requireKernel(t)
	for _, c := range []struct {
		name  string
		flags uint64
		from  uint64
		n     uint64
	}{
		{"part", 0, 3, 20},
		{"all with sizes", exchangeSetSizes, 0, 64},
		{"written", exchangeWritten, 0, 40},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := newImage(t, 320)
			patchSuperblock(t, img, func(b []byte) { setBits(b, sbOffIncompat, incompatExchange) })
			mounted(t, img, "", func(dir string) {
				p := newFiller(t, dir, 23)
				p.write("a", p.bytes(150_000))
				p.fallocate("a", 3, 20_000, 30_000)   // punch
				p.fallocate("a", 16, 100_000, 20_000) // unwritten
				p.write("b", p.bytes(250_001))
				p.fallocate("b", 3, 80_000, 50_000)
			})
			f := mustOpen(t, img)
			a, b := mustInode(t, f, "a"), mustInode(t, f, "b")
			sizeA, sizeB := b.stat.Size, a.stat.Size
			if c.flags&exchangeSetSizes == 0 {
				sizeA, sizeB = -1, -1
			}
			appendRecord(t, img, [][]byte{le(uint16(itemXMI), uint16(1), uint32(0), uint64(9),
				a.stat.Ino, b.stat.Ino, a.stat.Generation, b.stat.Generation,
				c.from, c.from, c.n, c.flags, sizeA, sizeB)})
			checkReplay(t, img)
		})
	}
}

// TestOtherItems replays items that files do not show, and refuses what is not known.
func TestOtherItems(t *testing.T) {
	requireKernel(t)
	img := newImage(t, 320)
	mounted(t, img, "", func(dir string) { newFiller(t, dir, 24).write("a", []byte("a")) })

	for kind, want := range map[uint16]string{itemIunlink: "IUNLINK", 0x1250: "0x1250"} {
		bad := diskfstest.CopyImage(t, img)
		appendRecord(t, bad, [][]byte{le(kind, uint16(1), uint32(0), uint64(1))})
		_, err := openImage(t, bad, diskfs.Options{})
		if !errors.Is(err, diskfs.ErrDirtyLog) || !errors.Is(err, diskfs.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("item %#x: error %v", kind, err)
		}
		f, err := openImage(t, bad, diskfs.Options{Stale: true})
		if err != nil {
			t.Fatal(err)
		}
		inoOf(t, f, "a")
	}

	quota := make([]byte, dquotSize)
	binary.BigEndian.PutUint16(quota, dquotMagic)
	quota[2], quota[3] = 1, 1
	quota[103] = 77
	const at = 200 << 20 / sector
	dquot := func(blkno int64) [][]byte {
		return [][]byte{le(uint16(itemDquot), uint16(2), uint32(0), blkno, int32(8), uint32(dquotRecord)), quota}
	}
	phys := func(kind uint16, id uint64) [][]byte {
		return [][]byte{le(kind, uint16(1), uint32(1), id, uint64(100), uint32(1), uint32(1))}
	}
	done := func(kind uint16, id uint64) [][]byte { return [][]byte{le(kind, uint16(1), uint32(0), id)} }
	appendRecord(t, img, dquot(at),
		phys(itemEFI, 1), [][]byte{le(uint16(itemEFD), uint16(1), uint32(1), uint64(1), uint64(100), uint32(1), uint32(0))},
		phys(itemCUI, 2), done(itemCUD, 2))
	f := mustOpen(t, img)
	b := make([]byte, dquotSize)
	if err := f.dev.readAt(b, at*sector+dquotRecord); err != nil || !bytes.Equal(b, quota) {
		t.Errorf("quota %x, %v", b, err)
	}
}

// TestParentPointers reads a file system with parent pointers, which are attributes
// that are not shown, clean and after a crash.
func TestParentPointers(t *testing.T) {
	requireKernel(t)
	img := newImage(t, 320)
	patchSuperblock(t, img, func(b []byte) { setBits(b, sbOffIncompat, incompatParent|incompatExchange) })
	mounted(t, img, "", func(dir string) {
		p := newFiller(t, dir, 25)
		p.special()
		p.xattrs()
		workload(p, 500)
	})
	var want map[string]file
	mounted(t, img, "ro", func(dir string) { want = kernelTree(t, dir) })
	compare(t, imageTree(t, mustOpen(t, img)), want)
	mounted(t, img, "", func(dir string) {
		p := newFiller(t, dir, 26)
		workload(p, 1000)
		// An exchange that was finished: XFS_IOC_EXCHANGE_RANGE with file1's descriptor,
		// offsets, length and flags.
		p.manyExtents("exchange-a", 100, 4096)
		p.write("exchange-b", p.bytes(100*4096))
		a, b := p.open("exchange-a"), p.open("exchange-b")
		arg := le(int32(a.Fd()), uint32(0), uint64(4096), uint64(4096), uint64(50*4096), uint64(0))
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, b.Fd(), 0x40285881, uintptr(unsafe.Pointer(&arg[0]))); errno != 0 {
			t.Error("exchange:", errno)
		}
		p.must(a.Close())
		p.must(b.Close())
		shutdown(t, dir, true)
	})
	checkReplay(t, img)
}

// TestSwappedExtents crashes after xfs_fsr's way of exchanging the extents of two files,
// which changes the owner of their trees without logging them. What the kernel showed
// before the crash is the witness: Linux 6.18 does not mount such a log (it verifies
// the inode's checksum before it has recomputed it).
func TestSwappedExtents(t *testing.T) {
	requireKernel(t)
	img := newImage(t, 320)
	var want map[string]file
	mounted(t, img, "", func(dir string) {
		p := newFiller(t, dir, 27)
		p.manyExtents("a", 1000, 4096)
		p.manyExtents("b", 1000, 4096)
		syncfs(t, dir)
		run(t, "xfs_io", "-c", "swapext "+p.path("b"), p.path("a"))
		want = kernelTree(t, dir)
		shutdown(t, dir, true)
	})
	f := mustOpen(t, img)
	compare(t, imageTree(t, f), want)
	if len(f.pending.newOwner) == 0 {
		t.Error("no tree changed its owner; the test needs that")
	}
}

// TestSplit compares with block by block lists.
func TestSplit(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var exts []extent
		var ranges [][2]uint64
		for off := uint64(rnd.IntN(5)); off < 60; off += uint64(rnd.IntN(6)) {
			n := uint64(1 + rnd.IntN(8))
			exts = append(exts, extent{off: off, start: 1000 + uint64(rnd.IntN(500)), n: n})
			off += n
		}
		for off := uint64(rnd.IntN(9)); off < 60; off += uint64(1 + rnd.IntN(9)) {
			n := uint64(1 + rnd.IntN(9))
			ranges = append(ranges, [2]uint64{off, off + n})
			off += n
		}
		blocks := func(exts []extent) map[uint64]uint64 {
			m := map[uint64]uint64{}
			for _, e := range exts {
				for i := range e.n {
					m[e.off+i] = e.start + i
				}
			}
			return m
		}
		wantIn, wantOut := map[uint64]uint64{}, blocks(exts)
		for _, r := range ranges {
			for b := r[0]; b < r[1]; b++ {
				if at, ok := wantOut[b]; ok {
					wantIn[b] = at
					delete(wantOut, b)
				}
			}
		}
		in, out := split(exts, ranges)
		if !maps.Equal(blocks(in), wantIn) || !maps.Equal(blocks(out), wantOut) {
			t.Fatalf("split(%v, %v) = %v, %v", exts, ranges, in, out)
		}
		if all := blocks(join(out, in)); !maps.Equal(all, blocks(exts)) {
			t.Fatalf("join gives %v for %v", all, exts)
		}
	}
}

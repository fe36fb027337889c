package xfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// memImage is the part of an image that was read, in memory; the rest is zeroes.
type memImage struct {
	mu     sync.Mutex
	pages  map[int64][]byte
	order  []int64
	size   int64
	source io.ReaderAt // nil once all is there that a test needs
}

func (m *memImage) page(no int64) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.pages[no]; p != nil || m.source == nil {
		return p, nil
	}
	p := make([]byte, pageSize)
	if _, err := m.source.ReadAt(p, no*pageSize); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	m.pages[no] = p
	m.order = append(m.order, no)
	return p, nil
}

func (m *memImage) ReadAt(p []byte, off int64) (int, error) {
	if off >= m.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), m.size-off))
	for done := 0; done < n; {
		at := off + int64(done)
		pg, err := m.page(at / pageSize)
		if err != nil {
			return done, err
		}
		k := min(n-done, int(pageSize-at%pageSize))
		if pg == nil {
			clear(p[done : done+k])
		} else {
			copy(p[done:done+k], pg[at%pageSize:])
		}
		done += k
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// load reads img through fn and keeps what was read.
func load(t testing.TB, img string, fn func(r io.ReaderAt, size int64)) *memImage {
	t.Helper()
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	m := &memImage{pages: map[int64][]byte{}, size: st.Size(), source: f}
	fn(m, st.Size())
	m.source = nil
	return m
}

func fillForFuzz(t testing.TB, dir string, block int64) {
	p := newFiller(t, dir, 41)
	p.special()
	p.xattrs()
	p.writeAt("sparse", p.bytes(5000), 1<<20)
	p.manyExtents("tree", 100, block)
	p.many("dir/short", 3, 1)
	p.many("dir/block", 20, 1)
	p.many("dir/leaf", 100, 20)
	p.many("dir/node", 700, 20)
}

// roam touches all of a file system that may be damaged, up to limits that a sound one
// does not reach, and reports whether it is done: it must not panic, hang or eat memory.
func roam(f *FS) {
	budget := 3000
	buf := make([]byte, 8192)
	var walk func(ino uint64, depth int)
	walk = func(ino uint64, depth int) {
		if budget--; budget < 0 || depth > 8 {
			return
		}
		i, err := f.Inode(ino)
		if err != nil {
			return
		}
		_, _ = i.Xattrs()
		_, _ = i.Readlink()
		for _, off := range []int64{0, 4095, 1 << 20, i.Stat().Size - 100} {
			_, _ = i.ReadAt(buf, max(off, 0))
		}
		for off, n := int64(0), 0; n < 300; n++ {
			e, err := i.NextData(off)
			if err != nil {
				break
			}
			off = e.Offset + e.Length
		}
		for d, err := range i.Entries() {
			if err != nil || budget < 0 {
				break
			}
			if !diskfs.ValidName(d.Name) {
				panic("a name got out that must not: " + d.Name)
			}
			if budget%5 == 0 {
				_, _ = i.Lookup(d.Name)
			}
			walk(d.Ino, depth+1)
		}
		_, _ = i.Lookup("not there")
	}
	walk(f.Root(), 0)
	_ = f.Info()
}

// bases are sound images to damage: clean ones with blocks of 1 and 4 KiB, and one with
// a dirty log.
func bases(t testing.TB) []*memImage {
	t.Helper()
	requireKernel(t)
	var ms []*memImage
	for _, mkfs := range [][]string{nil, {"-b", "size=1024"}} {
		img := newImage(t, 320, mkfs...)
		mounted(t, img, "", func(dir string) { fillForFuzz(t, dir, 4096) })
		ms = append(ms, load(t, img, func(r io.ReaderAt, size int64) {
			f, err := Open(r, size, diskfs.Options{})
			if err != nil {
				t.Fatal(err)
			}
			roam(f)
		}))
	}
	img := crashed(t, true, nil, nil, func(dir string) { fillForFuzz(t, dir, 4096) })
	return append(ms, load(t, img, func(r io.ReaderAt, size int64) {
		f, err := Open(r, size, diskfs.Options{})
		if err != nil {
			t.Fatal(err)
		}
		roam(f)
	}))
}

// damage lays changes over a base. Each takes 6 bytes of data: which page, where in it,
// and two bytes to write there. It gives the pages changed.
func (m *memImage) damage(data []byte) (*memImage, map[int64]bool) {
	out := &memImage{pages: make(map[int64][]byte, len(m.pages)), size: m.size}
	for no, p := range m.pages {
		out.pages[no] = p
	}
	changed := map[int64]bool{}
	for ; len(data) >= 6; data = data[6:] {
		no := m.order[int(le16(data, 0))%len(m.order)]
		if !changed[no] {
			changed[no] = true
			out.pages[no] = append([]byte(nil), out.pages[no]...)
		}
		at := int(le16(data, 2)) % (pageSize - 1)
		copy(out.pages[no][at:], data[4:6])
	}
	if changed[0] { // or nothing but its checksum is tested
		sb := out.pages[0][:512]
		binary.LittleEndian.PutUint32(sb[sbOffCRC:], checksum(sb, sbOffCRC))
	}
	return out, changed
}

// trust makes f take the given pages as if the log had written them, without the
// checksums of the blocks on them.
func trust(f *FS, m *memImage, pages map[int64]bool) {
	if f.dev.over == nil {
		f.dev.over = newOverlay(&device{r: m, size: m.size})
	}
	for no := range pages {
		pg := f.dev.over.pages[no]
		if pg == nil {
			pg = &page{data: [pageSize]byte(m.pages[no])}
			f.dev.over.pages[no] = pg
		}
		pg.changed = 0xff
	}
	f.cache = newBlockCache(cacheBytes)
}

// FuzzImage reads damaged images, with checksums and as if they were right.
func FuzzImage(f *testing.F) {
	ms := bases(f)
	for i := range byte(12) {
		f.Add(i, []byte{i, 0, 4, 0, 0xff, 0xff, i, 1, 8, 2, 1, 0, i * 7, 0, 60, 1, 0, 0})
	}
	f.Fuzz(func(t *testing.T, which byte, data []byte) {
		if len(data) > 600 {
			t.Skip("long inputs find no more")
		}
		base := ms[int(which)%len(ms)]
		m, changed := base.damage(data)
		for _, stale := range []bool{false, true} {
			diskfstest.Bounded(t, maxAllocated, func() {
				fsys, err := Open(m, m.size, diskfs.Options{Stale: stale})
				if err != nil {
					if !errors.Is(err, diskfs.ErrCorrupt) && !errors.Is(err, diskfs.ErrUnsupported) && !errors.Is(err, diskfs.ErrNotRecognised) {
						t.Errorf("error of an unknown kind: %v", err)
					}
					return
				}
				trust(fsys, m, changed)
				roam(fsys)
			})
		}
	})
}

// FuzzLogItem replays a log item of any content, and reads what comes of it.
func FuzzLogItem(f *testing.F) {
	dirty := bases(f)[2]
	whole, err := Open(dirty, dirty.size, diskfs.Options{Stale: true})
	if err != nil {
		f.Fatal(err)
	}
	l, err := whole.newLogRing()
	if err != nil {
		f.Fatal(err)
	}
	ends, err := l.findEnds()
	if err != nil {
		f.Fatal(err)
	}
	seeds := map[uint16]int{}
	a := newAssembler(func(t *transaction) error {
		for _, it := range t.items {
			if seeds[it.kind]++; seeds[it.kind] < 8 {
				r := append(append([][]byte(nil), it.regions...), nil, nil)
				f.Add(it.kind, r[0], r[1], r[2])
			}
		}
		return nil
	})
	if err := l.walk(ends, a.add); err != nil {
		f.Fatal(err)
	}
	root := whole.Root()
	f.Add(uint16(itemBUI), bui(1, bmapMap, root+3, extent{start: 100, n: 2}), []byte{}, []byte{})
	f.Add(uint16(itemATTRI), le(uint16(itemATTRI), uint16(3), uint32(0), uint64(1), root, uint32(1), uint32(4), uint32(4), uint32(0)), []byte("name"), []byte("valu"))
	f.Add(uint16(itemXMI), le(uint16(itemXMI), uint16(1), uint32(0), uint64(9), root+3, root+4, uint32(0), uint32(0),
		uint64(0), uint64(0), uint64(9), uint64(2), uint64(99), uint64(98)), []byte{}, []byte{})
	f.Add(uint16(itemDquot), le(uint16(itemDquot), uint16(2), uint32(0), int64(99), int32(8), uint32(0)), make([]byte, dquotSize), []byte{})
	f.Fuzz(func(t *testing.T, kind uint16, r0, r1, r2 []byte) {
		if len(r0) < 4 {
			return
		}
		fsys, err := Open(dirty, dirty.size, diskfs.Options{Stale: true})
		if err != nil {
			t.Fatal(err)
		}
		rp := newReplay(fsys)
		over := newOverlay(&device{r: dirty, size: dirty.size})
		over.limit = 4096
		fsys.dev.over = over
		it := &logItem{kind: kind, total: 1, regions: [][]byte{r0}}
		for _, r := range [][]byte{r1, r2} {
			if len(r) > 0 {
				it.regions, it.total = append(it.regions, r), it.total+1
			}
		}
		tr := &transaction{lsn: 1 << 40, items: []*logItem{it}}
		for _, step := range []func() error{
			func() error { return rp.collect(tr) },
			func() error { return rp.apply(tr) },
			rp.finishIntents,
		} {
			if err := step(); err != nil {
				return
			}
		}
		diskfstest.Bounded(t, maxAllocated, func() { roam(fsys) })
	})
}

// maxAllocated is many times what roaming a sound image takes.
const maxAllocated = 128 << 20

// FuzzOperations takes the operations of a record apart.
func FuzzOperations(f *testing.F) {
	item := le(uint16(itemBUD), uint16(2), uint32(0), uint64(5))
	header := append(le(uint32(transHeaderMagic)), make([]byte, 12)...)
	for _, ops := range [][][]byte{
		{operation(opStart, nil), operation(0, header), operation(0, item), operation(0, item), operation(opCommit, nil)},
		{operation(opStart, nil), operation(opContinue, header[:8]), operation(opContinued, header[8:]), operation(opContinue, item),
			operation(opContinued|opEnd, item), operation(opCommit, nil)},
		{operation(opStart, nil), operation(opUnmount, item)},
	} {
		f.Add(bytes.Join(ops, nil))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		total := 0
		a := newAssembler(func(tr *transaction) error {
			for _, it := range tr.items {
				for _, r := range it.regions {
					total += len(r)
				}
			}
			return nil
		})
		_ = a.add(record{ops: len(data)}, data)
		if total > len(data) {
			t.Errorf("%d bytes of regions out of %d", total, len(data))
		}
	})
}

// TestConcurrentReaders has many goroutines read one file system; the race detector
// looks on.
func TestConcurrentReaders(t *testing.T) {
	requireKernel(t)
	img := crashed(t, true, []string{"-b", "size=1024"}, nil, func(dir string) { fillForFuzz(t, dir, 1024) })
	want := imageTree(t, mustOpen(t, img))
	f := mustOpen(t, img)
	f.cache = newBlockCache(64 << 10) // so that blocks come and go
	var wg sync.WaitGroup
	trees := make([]map[string]file, 6)
	for g := range trees {
		wg.Go(func() {
			tree := map[string]file{}
			var walk func(path string, ino uint64)
			walk = func(path string, ino uint64) {
				i, err := f.Inode(ino)
				if err != nil {
					t.Error(path, err)
					return
				}
				xs, err := i.Xattrs()
				if err != nil {
					t.Error(path, err)
				}
				e := file{Ino: ino, Size: i.Stat().Size, Xattrs: xattrString(xs)}
				if i.Stat().Mode&unix.S_IFMT == unix.S_IFREG {
					e.Sum = contentSum(t, i, e.Size, "")
				}
				tree[path] = e
				if i.Stat().Mode&unix.S_IFMT == unix.S_IFDIR {
					for d, err := range i.Entries() {
						if err != nil {
							t.Error(path, err)
							return
						}
						walk(filepath.Join(path, d.Name), d.Ino)
					}
				}
			}
			walk(".", f.Root())
			trees[g] = tree
		})
	}
	wg.Wait()
	for _, tree := range trees {
		if len(tree) != len(want) {
			t.Fatalf("%d entries, want %d", len(tree), len(want))
		}
		for path, e := range tree {
			if w := want[path]; e.Sum != w.Sum || e.Xattrs != w.Xattrs || e.Size != w.Size {
				t.Fatalf("%s: %+v, want %+v", path, e, w)
			}
		}
	}
}

// TestLazy counts the bytes that opening and a first listing fetch from a large volume.
func TestLazy(t *testing.T) {
	requireKernel(t)
	img := newImage(t, 1<<20) // 1 TiB
	mounted(t, img, "", func(dir string) { newFiller(t, dir, 51).many("d", 1000, 20) })
	m := load(t, img, func(r io.ReaderAt, size int64) {
		f, err := Open(r, size, diskfs.Options{})
		if err != nil {
			t.Fatal(err)
		}
		i, err := f.Inode(f.Root())
		if err != nil {
			t.Fatal(err)
		}
		for _, err := range i.Entries() {
			if err != nil {
				t.Fatal(err)
			}
		}
	})
	if n := len(m.pages) * pageSize; n > 512<<10 {
		t.Errorf("%d KiB fetched to open a clean volume and list its root", n>>10)
	}
}

//go:build linux

package fat

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// made is a FAT32 volume with clusters of one sector. Its table and its root directory are written
// by hand; each other cluster begins with its number.
type made struct {
	head      []byte
	dataStart int64
	size      int64
	reads     atomic.Int64 // of the table
}

const (
	madeSector = 512
	madeTable  = 32 * madeSector
	chainEnd   = 0x0fffffff
)

// newMade makes a volume with a root directory of root clusters, from cluster 2 on.
func newMade(clusters, root int) *made {
	perTable := (4*(clusters+2) + madeSector - 1) / madeSector
	m := &made{dataStart: madeTable + int64(perTable)*madeSector}
	m.size = m.dataStart + int64(clusters)*madeSector
	m.head = make([]byte, m.dataStart+int64(root)*madeSector)
	b := m.head
	b[0], b[13], b[16], b[510], b[511] = 0xeb, 1, 1, 0x55, 0xaa
	le.PutUint16(b[11:], madeSector)
	le.PutUint16(b[14:], madeTable/madeSector)
	le.PutUint32(b[32:], uint32(m.size/madeSector))
	le.PutUint32(b[36:], uint32(perTable))
	le.PutUint32(b[44:], 2)
	for i := range uint32(root) {
		m.link(2+i, 3+i)
	}
	m.link(1+uint32(root), chainEnd)
	return m
}

func (m *made) link(cluster, next uint32) { le.PutUint32(m.head[madeTable+4*cluster:], next) }

// chain links clusters to each other.
func (m *made) chain(clusters ...uint32) {
	for i, c := range clusters[1:] {
		m.link(clusters[i], c)
	}
	m.link(clusters[len(clusters)-1], chainEnd)
}

// entry gives the i-th entry of the root directory.
func (m *made) entry(i int) []byte { return m.head[m.dataStart+int64(i)*entrySize:][:entrySize] }

// file makes the i-th entry one of a file.
func (m *made) file(i int, attr byte, cluster uint32, size int) {
	e := m.entry(i)
	copy(e, fmt.Sprintf("F%07d   ", i))
	e[entryAttr] = attr
	le.PutUint16(e[20:], uint16(cluster>>16))
	le.PutUint16(e[26:], uint16(cluster))
	le.PutUint32(e[28:], uint32(size))
}

func (m *made) ReadAt(p []byte, off int64) (int, error) {
	if off >= madeTable && off < m.dataStart {
		m.reads.Add(1)
	}
	n := copy(p, m.head[min(off, int64(len(m.head))):])
	for ; n < len(p) && off+int64(n) < m.size; n++ {
		p[n] = 0
		at := off + int64(n) - m.dataStart
		if in := at % madeSector; in < 4 {
			p[n] = byte((2 + at/madeSector) >> (8 * in))
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *made) open(t testing.TB) *FS {
	t.Helper()
	f, err := Open(m, m.size, diskfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// list gives the files of the root directory.
func list(t testing.TB, f *FS) map[string]diskfs.Inode {
	t.Helper()
	root, err := f.Inode(f.Root())
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]diskfs.Inode{}
	for e, err := range root.Entries() {
		if err != nil {
			t.Fatal(err)
		}
		if files[e.Name], err = f.Inode(e.Ino); err != nil {
			t.Fatal(e.Name, err)
		}
	}
	return files
}

// scattered links clusters in two places by turns, and gives their order.
func scattered(m *made, n int) []uint32 {
	order := make([]uint32, n)
	for i := range order {
		order[i] = 100 + uint32(i)/2 + uint32(i%2*n)
	}
	m.chain(order...)
	return order
}

// TestScatteredFile reads a file of which no two clusters lie together. With one piece of the table
// in memory, each link costs a read.
func TestScatteredFile(t *testing.T) {
	const n = 50_000
	m := newMade(2*n, 1)
	order := scattered(m, n)
	m.file(0, 0, order[0], n*madeSector-100)
	f := m.open(t)
	f.chunks = 1
	file := list(t, f)["F0000000"]
	cost := func(limit int64, what string, do func()) {
		t.Helper()
		m.reads.Store(0)
		do()
		if got := m.reads.Load(); got > limit {
			t.Errorf("%s: %d reads of the table, want at most %d", what, got, limit)
		}
	}
	buf := make([]byte, 64<<10)
	read := func(i, clusters int) {
		t.Helper()
		b := buf[:clusters*madeSector]
		got, err := file.ReadAt(b, int64(i)*madeSector)
		if err != nil && !errors.Is(err, io.EOF) || got == 0 {
			t.Fatal(i, got, err)
		}
		for j := 0; j*madeSector < got; j++ {
			if at := le.Uint32(b[j*madeSector:]); at != order[i+j] {
				t.Fatalf("cluster %d is %d, want %d", i+j, at, order[i+j])
			}
		}
	}
	cost(2*n, "all ranges", func() {
		off := int64(0)
		for i, cluster := range order {
			e, err := file.NextData(off)
			if err != nil || e.Offset != off || e.Device != f.clusterStart(cluster) || e.Length != min(madeSector, n*madeSector-100-off) {
				t.Fatalf("range %d: %+v, %v", i, e, err)
			}
			off += e.Length
		}
		if _, err := file.NextData(off); !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	})
	cost(2*n, "all of it", func() {
		for i := 0; i < n; i += len(buf) / madeSector {
			read(i, len(buf)/madeSector)
		}
	})
	rnd := rand.New(rand.NewPCG(1, 2))
	cost(200*(stride+2), "anywhere", func() {
		for range 200 {
			read(rnd.IntN(n), 1)
		}
	})
	cost(400*(stride+2), "in two places by turns", func() {
		for i := range 200 {
			read(i, 1)
			read(n/2+i, 1)
		}
	})
	cost(3*n, "each range three times", func() {
		for i := range n {
			for range 3 {
				if _, err := file.NextData(int64(i) * madeSector); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// TestWholeFile finds long ranges in pieces of a bounded length.
func TestWholeFile(t *testing.T) {
	const n = 10 * stride
	m := newMade(n+100, 1)
	order := make([]uint32, n)
	for i := range order {
		order[i] = 10 + uint32(i)
	}
	m.chain(order...)
	m.file(0, 0, order[0], n*madeSector)
	f := m.open(t)
	file := list(t, f)["F0000000"]
	ranges := 0
	for off := int64(0); off < n*madeSector; ranges++ {
		e, err := file.NextData(off)
		if err != nil || e.Offset != off || e.Device != f.clusterStart(10)+off || e.Length > stride*madeSector {
			t.Fatalf("at %d: %+v, %v", off, e, err)
		}
		off += e.Length
	}
	if ranges != n/stride {
		t.Errorf("%d ranges, want %d", ranges, n/stride)
	}
	b := make([]byte, n*madeSector)
	if got, err := file.ReadAt(b, 0); got != len(b) || err != nil || le.Uint32(b[len(b)-madeSector:]) != order[n-1] {
		t.Errorf("%d bytes, %v", got, err)
	}
}

// TestManyFilesOfOneChain holds many files that all have the same clusters.
func TestManyFilesOfOneChain(t *testing.T) {
	const n, files = 20_000, 400
	m := newMade(2*n, files/16)
	order := scattered(m, n)
	for i := range files {
		m.file(i, 0, order[0], n*madeSector)
	}
	f := m.open(t)
	var all map[string]diskfs.Inode
	diskfstest.Bounded(t, 16<<20, func() {
		all = list(t, f)
		b := make([]byte, 4)
		for name, file := range all {
			if _, err := file.ReadAt(b, (n-1)*madeSector); err != nil || le.Uint32(b) != order[n-1] {
				t.Fatal(name, b, err)
			}
		}
	})
	if len(all) != files {
		t.Errorf("%d files", len(all))
	}
}

// TestConcurrentReaders reads one file in many places at once.
func TestConcurrentReaders(t *testing.T) {
	const n = 5000
	m := newMade(2*n, 1)
	order := scattered(m, n)
	m.file(0, 0, order[0], n*madeSector)
	file := list(t, m.open(t))["F0000000"]
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			b := make([]byte, 4)
			for i := g * 100; i < n; i += 7 {
				if _, err := file.ReadAt(b, int64(i)*madeSector); err != nil || le.Uint32(b) != order[i] {
					t.Error(i, b, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestDamagedChains reads files up to where their chains are damaged, and directories.
func TestDamagedChains(t *testing.T) {
	m := newMade(1000, 2)
	m.chain(10, 20, 30)
	m.file(0, 0, 10, 3*madeSector)
	m.file(1, 0, 10, 4*madeSector) // its chain is too short
	m.chain(40, 50, 60)
	m.link(60, 5000) // beyond the volume
	m.file(2, 0, 40, 3*madeSector)
	m.file(3, 0, 40, 4*madeSector)
	m.link(70, 70) // for ever
	m.file(4, 0, 70, 2000*madeSector)
	m.file(5, attrDirectory, 70, 0)
	m.file(6, 0, 0, madeSector) // no chain
	f := m.open(t)
	files := list(t, f)
	for name, whole := range map[string]int64{"F0000000": 3, "F0000001": 3, "F0000002": 3, "F0000003": 3, "F0000004": 1000, "F0000006": 0} {
		file := files[name]
		damaged := file.Stat().Size > whole*madeSector
		b := make([]byte, whole*madeSector)
		if n, err := file.ReadAt(b, 0); n != len(b) || err != nil {
			t.Errorf("%s: %d bytes of %d, %v", name, n, len(b), err)
		}
		if _, err := file.ReadAt(make([]byte, 1), whole*madeSector); errors.Is(err, diskfs.ErrCorrupt) != damaged {
			t.Errorf("%s, behind what its chain holds: %v", name, err)
		}
		if _, err := file.NextData(whole * madeSector); errors.Is(err, diskfs.ErrCorrupt) != damaged || !damaged && !errors.Is(err, io.EOF) {
			t.Errorf("%s, ranges behind what its chain holds: %v", name, err)
		}
	}
	if st := files["F0000005"].Stat(); st.Size != 1000*madeSector {
		t.Errorf("the directory has %d bytes", st.Size)
	}
	for range files["F0000005"].Entries() { // it ends
	}
}

// hostileNames are entries for parts 1 and 0 of a long name.
var hostileNames = []byte("\x41\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0f\x00\x00" + strings.Repeat("\x00", 18) +
	"\x40\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0f\x00\x00" + strings.Repeat("\x00", 18))

// TestNamePartZero lists a directory in which part 0 of a long name follows part 1.
func TestNamePartZero(t *testing.T) {
	m := newMade(100, 1)
	copy(m.head[m.dataStart:], hostileNames)
	m.file(2, 0, 0, 0)
	if files := list(t, m.open(t)); len(files) != 1 || files["F0000002"] == nil {
		t.Errorf("%v", files)
	}
}

// FuzzDirectory lists any bytes as a directory.
func FuzzDirectory(f *testing.F) {
	m := newMade(100, 4)
	dir := m.head[m.dataStart:]
	f.Add(hostileNames)
	m.file(0, 0, 0, 0)
	f.Add(bytes.Clone(m.entry(0)))
	f.Fuzz(func(t *testing.T, b []byte) {
		clear(dir)
		copy(dir, b)
		root, err := m.open(t).Inode(rootIno)
		if err != nil {
			t.Fatal(err)
		}
		for e, err := range root.Entries() {
			if err == nil && !diskfs.ValidName(e.Name) {
				t.Errorf("the name %q", e.Name)
			}
		}
	})
}

// TestTimes reads dates as Linux does (fat_time_fat2unix).
func TestTimes(t *testing.T) {
	first := time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		date, clock uint16
		hundredths  byte
		want        time.Time
	}{
		{0, 0, 0, first},
		{0x0020, 0, 0, first},
		{0x0001, 0, 0, first},
		{5 << 5, 0, 0, time.Date(1980, 5, 1, 0, 0, 0, 0, time.UTC)},
		{44<<9 | 2<<5 | 29, 23<<11 | 59<<5 | 29, 150, time.Date(2024, 2, 29, 23, 59, 59, 5e8, time.UTC)},
		{127<<9 | 12<<5 | 31, 0, 0, time.Date(2107, 12, 31, 0, 0, 0, 0, time.UTC)},
	} {
		if got := dosTime(c.date, c.clock, c.hundredths); !got.Equal(c.want) {
			t.Errorf("date %#x, time %#x: %v, want %v", c.date, c.clock, got, c.want)
		}
	}
	m := newMade(100, 1)
	m.file(0, 0, 0, 0)
	f := m.open(t)
	if st := list(t, f)["F0000000"].Stat(); !st.Mtime.Equal(first) || !st.Atime.Equal(first) || !st.Ctime.Equal(first) || !st.Btime.IsZero() {
		t.Errorf("a file without dates: %+v", st)
	}
	root, err := f.Inode(f.Root())
	if err != nil {
		t.Fatal(err)
	}
	if st := root.Stat(); st.Mtime.Unix() != 0 || st.Atime.Unix() != 0 || st.Ctime.Unix() != 0 {
		t.Errorf("the root directory: %+v", st)
	}
}

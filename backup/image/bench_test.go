package image

import (
	"math/rand/v2"
	"testing"

	"github.com/varve-io/varve/backup/blocktree/blocktreetest"
)

func benchDisk(b *testing.B) (*blocktreetest.Store, *blocktreetest.Point) {
	b.Helper()
	s := &blocktreetest.Store{}
	d := blocktreetest.NewDisk(256*mib, 128*kib)
	for i := range d.Layout.Blocks() {
		d.FillBlock(i, uint64(i)+1)
	}
	return s, write(b, s, d, nil)
}

// BenchmarkCachedRandom reads 4 KiB at random from a disk that is cached.
func BenchmarkCachedRandom(b *testing.B) {
	s, p := benchDisk(b)
	c := NewCache(512 * mib)
	defer c.Close()
	m := open(b, s, c, p)
	if _, err := m.ReadAt(make([]byte, 256*mib), 0); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(4096)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		rng := rand.New(rand.NewPCG(1, 2))
		buf := make([]byte, 4096)
		for pb.Next() {
			if _, err := m.ReadAt(buf, rng.Int64N(64*1024-1)*4096); err != nil {
				b.Error(err)
			}
		}
	})
}

// BenchmarkColdSequential reads a disk once through an empty cache.
func BenchmarkColdSequential(b *testing.B) {
	s, p := benchDisk(b)
	b.SetBytes(256 * mib)
	buf := make([]byte, 256*kib)
	for b.Loop() {
		c := NewCache(512 * mib)
		m := open(b, s, c, p)
		for off := int64(0); off < m.Size(); off += int64(len(buf)) {
			if _, err := m.ReadAt(buf, off); err != nil {
				b.Fatal(err)
			}
		}
		c.Close()
	}
}

// BenchmarkStream is a restore without a target.
func BenchmarkStream(b *testing.B) {
	s, p := benchDisk(b)
	c := NewCache(0)
	defer c.Close()
	m := open(b, s, c, p)
	b.SetBytes(256 * mib)
	for b.Loop() {
		if err := m.Stream(b.Context(), 0, m.Size(), StreamOptions{}, func(int64, []byte, int64) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

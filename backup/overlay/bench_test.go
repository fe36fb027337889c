package overlay

import (
	"context"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// blank is a base of zeroes.
type blank int64

func (b blank) Size() int64 { return int64(b) }

func (blank) ReadAt(_ context.Context, p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

func (b blank) Extents(_ context.Context, off, _ int64, yield func(int64, bool, bool) bool) error {
	yield(int64(b)-off, true, true)
	return nil
}

// Writes of a granule each: to new places, which changes the map, and again to the same
// places, which does not.
func BenchmarkWrite(b *testing.B) {
	const area = 128 << 20
	ctx, p := context.Background(), make([]byte, Granule)
	for _, fresh := range []bool{true, false} {
		for _, parallel := range []int{1, 8} {
			name := map[bool]string{true: "new", false: "again"}[fresh] + map[int]string{1: "", 8: "-parallel"}[parallel]
			b.Run(name, func(b *testing.B) {
				o, err := Open(blank(area), Options{Dir: filepath.Join(b.TempDir(), "overlay")})
				if err != nil {
					b.Fatal(err)
				}
				defer o.Close()
				var next atomic.Int64
				write := func() {
					n := next.Add(1) - 1
					at := n * 7919 % (area / Granule) // all of them, scattered
					if _, err := o.WriteAt(ctx, p, at*Granule); err != nil {
						b.Error(err)
					}
				}
				b.SetBytes(Granule)
				if !fresh {
					for range area / Granule {
						write()
					}
				}
				b.ResetTimer()
				for done := 0; done < b.N; {
					n := min(b.N-done, area/Granule)
					done += n
					if parallel == 1 {
						for range n {
							write()
						}
					} else {
						each := make(chan struct{})
						for range parallel {
							go func() {
								for range n / parallel {
									write()
								}
								each <- struct{}{}
							}()
						}
						for range parallel {
							<-each
						}
					}
					if fresh {
						b.StopTimer()
						if err := o.Trim(ctx, 0, area); err != nil {
							b.Fatal(err)
						}
						b.StartTimer()
					}
				}
			})
		}
	}
}

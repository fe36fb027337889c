package zero

import "testing"

func TestOnly(t *testing.T) {
	for _, size := range []int{0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 4096} {
		p := make([]byte, size)
		if !Only(p) {
			t.Errorf("%d zeroes are not zero", size)
		}
		for i := range p {
			p[i] = 0x80
			if Only(p) {
				t.Errorf("%d bytes with one set at %d are zero", size, i)
			}
			p[i] = 0
		}
	}
}

func BenchmarkOnly(b *testing.B) {
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		if !Only(p) {
			b.Fatal("not zero")
		}
	}
}

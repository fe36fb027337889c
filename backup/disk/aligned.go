package disk

import (
	"sync"
	"unsafe"
)

// AlignedBuffer allocates n bytes of memory aligned for direct I/O: reading into it at
// aligned offsets needs no copy.
func AlignedBuffer(n int) []byte {
	b := make([]byte, n+pageSize-1)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (pageSize - 1))
	return b[skip : skip+n : skip+n]
}

func aligned(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))&(pageSize-1) == 0
}

// bounceSize is the size of the buffers for unaligned memory, a multiple of every block size;
// larger requests are split.
const bounceSize = 1 << 20

var bouncePool = sync.Pool{New: func() any {
	b := AlignedBuffer(bounceSize)
	return &b
}}

// withBounce lends an aligned buffer of bounceSize bytes.
func withBounce(use func(buffer []byte) error) error {
	b := bouncePool.Get().(*[]byte)
	defer bouncePool.Put(b)
	return use(*b)
}

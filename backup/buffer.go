package backup

import (
	"encoding/binary"
	"unsafe"
)

// bufferAlign is what direct I/O asks of a buffer's address on any device.
const bufferAlign = 4096

// newAlignedBuffer returns n bytes whose address suits direct I/O.
func newAlignedBuffer(n int) []byte {
	raw := make([]byte, n+bufferAlign)
	skip := 0
	if rest := int(uintptr(unsafe.Pointer(&raw[0])) % bufferAlign); rest != 0 {
		skip = bufferAlign - rest
	}
	return raw[skip : skip+n : skip+n]
}

// isZero reports whether p is all zeroes. Data is told from zeroes within a
// word or two, and zeroes are passed at the speed of memory.
func isZero(p []byte) bool {
	for len(p) >= 64 {
		if binary.NativeEndian.Uint64(p)|binary.NativeEndian.Uint64(p[8:])|
			binary.NativeEndian.Uint64(p[16:])|binary.NativeEndian.Uint64(p[24:])|
			binary.NativeEndian.Uint64(p[32:])|binary.NativeEndian.Uint64(p[40:])|
			binary.NativeEndian.Uint64(p[48:])|binary.NativeEndian.Uint64(p[56:]) != 0 {
			return false
		}
		p = p[64:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

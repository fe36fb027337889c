package disk

import "unsafe"

// AlignedBuffer returns n bytes at an address that suits direct I/O.
func AlignedBuffer(n int) []byte {
	raw := make([]byte, n+directAlign)
	skip := 0
	if rest := int(uintptr(unsafe.Pointer(&raw[0])) % directAlign); rest != 0 {
		skip = directAlign - rest
	}
	return raw[skip : skip+n : skip+n]
}

func aligned(p []byte) bool {
	return len(p) > 0 && uintptr(unsafe.Pointer(&p[0]))%directAlign == 0
}

// Package zero recognises memory that holds zeroes only, which is neither stored nor sent.
package zero

import (
	"bytes"
	"encoding/binary"
)

// Only reports whether p holds zeroes only; an empty p does. It stops at the first
// other byte and goes at the speed of memory otherwise: comparing p with itself, eight
// bytes on, uses the processor's widest registers.
func Only(p []byte) bool {
	if len(p) < 8 {
		for _, b := range p {
			if b != 0 {
				return false
			}
		}
		return true
	}
	return binary.NativeEndian.Uint64(p) == 0 && bytes.Equal(p[8:], p[:len(p)-8])
}

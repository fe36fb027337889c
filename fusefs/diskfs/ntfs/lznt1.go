package ntfs

import (
	"errors"
	"fmt"
)

const (
	chunkSize   = 4096 // what a chunk unpacks to
	chunkPacked = 0x8000
)

var errPacked = errors.New("compressed data contradicts itself")

// unpackLZNT1 unpacks src into dst, which is zeroed: chunks with a header of two bytes,
// the lower twelve bits of which are its length less one.
func unpackLZNT1(dst, src []byte) error {
	for at := 0; at < len(dst) && len(src) >= 2; at += chunkSize {
		header := le.Uint16(src)
		if header == 0 {
			return nil
		}
		n := int(header&0xfff) + 1
		if n > len(src)-2 {
			return fmt.Errorf("%w: chunk of %d bytes", errPacked, n)
		}
		chunk, out := src[2:2+n], dst[at:min(at+chunkSize, len(dst))]
		src = src[2+n:]
		if header&chunkPacked == 0 {
			copy(out, chunk)
			continue
		}
		if err := unpackChunk(out, chunk); err != nil {
			return err
		}
	}
	return nil
}

// unpackChunk unpacks one chunk: a byte of flags stands before eight elements, each a
// byte, or two that say how far back to go and how much to copy. How many bits of
// these are the distance grows with the place in the chunk.
func unpackChunk(dst, src []byte) error {
	at := 0
	for len(src) > 0 {
		flags := src[0]
		src = src[1:]
		for range 8 {
			if len(src) == 0 {
				return nil
			}
			if flags&1 == 0 {
				if at == len(dst) {
					return fmt.Errorf("%w: a chunk is too long", errPacked)
				}
				dst[at] = src[0]
				at, src, flags = at+1, src[1:], flags>>1
				continue
			}
			if len(src) < 2 || at == 0 {
				return fmt.Errorf("%w: a copy of nothing", errPacked)
			}
			token := le.Uint16(src)
			shift, mask := 12, uint16(0xfff)
			for i := at - 1; i >= 16; i >>= 1 {
				shift, mask = shift-1, mask>>1
			}
			back, n := int(token>>shift)+1, int(token&mask)+3
			if back > at || n > len(dst)-at {
				return fmt.Errorf("%w: copy of %d bytes from %d before byte %d", errPacked, n, back, at)
			}
			for range n { // ranges may overlap: byte by byte
				dst[at] = dst[at-back]
				at++
			}
			src, flags = src[2:], flags>>1
		}
	}
	return nil
}

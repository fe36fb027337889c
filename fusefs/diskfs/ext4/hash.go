package ext4

import "math/bits"

// Hashes of names in hashed directories (kernel documentation, "Hash Tree
// Directories": dx_hash). The superblock says whether bytes are signed.
const (
	hashLegacy = iota
	hashHalfMD4
	hashTEA
	hashUnsigned // added to the others
)

const (
	md4K2    = 0x5a827999 // round constants of MD4 (RFC 1320)
	md4K3    = 0x6ed9eba1
	teaDelta = 0x9e3779b9 // of TEA (Wheeler and Needham, 1994)
	hashEOF  = 0x7fffffff // marks the end of a directory, so no name has it
)

// hashName hashes a name as the given version of hash does. ok is false for versions
// that are not known, and where the superblock does not say how bytes are signed.
func (sb *superblock) hashName(version uint8, name string) (hash uint32, ok bool) {
	unsigned := version >= hashUnsigned
	if !unsigned {
		if sb.flags&(sbFlagSignedHash|sbFlagUnsignedHash) == 0 {
			return 0, false
		}
		unsigned = sb.flags&sbFlagUnsignedHash != 0
	} else {
		version -= hashUnsigned
	}
	state := [4]uint32{0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476} // as MD4's
	if sb.hashSeed != [4]uint32{} {
		state = sb.hashSeed
	}
	switch version {
	case hashLegacy:
		hash = legacyHash(name, unsigned)
	case hashHalfMD4:
		for p := name; len(p) > 0; p = p[min(32, len(p)):] {
			var in [8]uint32
			packName(in[:], p, unsigned)
			halfMD4(&state, &in)
		}
		hash = state[1]
	case hashTEA:
		for p := name; len(p) > 0; p = p[min(16, len(p)):] {
			var in [4]uint32
			packName(in[:], p, unsigned)
			tea(&state, &in)
		}
		hash = state[0]
	default:
		return 0, false
	}
	if hash &^= 1; hash == hashEOF<<1 {
		hash = (hashEOF - 1) << 1
	}
	return hash, true
}

// char widens a byte of a name as C's char would.
func char(c byte, unsigned bool) uint32 {
	if unsigned {
		return uint32(c)
	}
	return uint32(int32(int8(c)))
}

// packName packs the front of a name into words, most significant byte first, and
// fills up with the length of what is left of the name.
func packName(out []uint32, p string, unsigned bool) {
	pad := uint32(len(p)) | uint32(len(p))<<8
	pad |= pad << 16
	p = p[:min(len(p), 4*len(out))]
	for i := range out {
		v := pad
		for _, c := range []byte(p[min(4*i, len(p)):min(4*i+4, len(p))]) {
			v = char(c, unsigned) + v<<8
		}
		out[i] = v
	}
}

func legacyHash(name string, unsigned bool) uint32 {
	h0, h1 := uint32(0x12a3fe2d), uint32(0x37abe8f9)
	for _, c := range []byte(name) {
		h := h1 + (h0 ^ char(c, unsigned)*7152373)
		if h&0x80000000 != 0 {
			h -= 0x7fffffff
		}
		h1, h0 = h0, h
	}
	return h0 << 1
}

// tea is sixteen rounds of TEA with in as the key.
func tea(state, in *[4]uint32) {
	b0, b1, sum := state[0], state[1], uint32(0)
	for range 16 {
		sum += teaDelta
		b0 += (b1<<4 + in[0]) ^ (b1 + sum) ^ (b1>>5 + in[1])
		b1 += (b0<<4 + in[2]) ^ (b0 + sum) ^ (b0>>5 + in[3])
	}
	state[0] += b0
	state[1] += b1
}

// halfMD4 is MD4 (RFC 1320) with 8 words of input and 8 steps in each round.
func halfMD4(state *[4]uint32, in *[8]uint32) {
	a, b, c, d := state[0], state[1], state[2], state[3]
	step := func(f, x uint32, s int) {
		a, b, c, d = d, bits.RotateLeft32(a+f+x, s), b, c
	}
	for i, s := range [8]int{3, 7, 11, 19, 3, 7, 11, 19} {
		step(d^(b&(c^d)), in[i], s)
	}
	for i, s := range [8]int{3, 5, 9, 13, 3, 5, 9, 13} {
		step(b&c+(b^c)&d, in[[8]int{1, 3, 5, 7, 0, 2, 4, 6}[i]]+md4K2, s)
	}
	for i, s := range [8]int{3, 9, 11, 15, 3, 9, 11, 15} {
		step(b^c^d, in[[8]int{3, 7, 2, 6, 1, 5, 0, 4}[i]]+md4K3, s)
	}
	state[0] += a
	state[1] += b
	state[2] += c
	state[3] += d
}

package probe

import "fmt"

// ZFS keeps four labels of 256 KiB, two at the start of a device and two at its end. Each
// begins with 16 KiB for boot code and a header, then holds a list of names and values
// in XDR (RFC 4506), big-endian: "name", "pool_guid", "guid", "state", "txg", …
const (
	zfsLabel = 256 << 10
	zfsList  = 112 << 10
	zfsMin   = 64 << 20

	xdrUint64    = 8
	xdrString    = 9
	xdrDirectory = 19

	zfsPairs = 4096 // bounds the walk over a list
)

func findZFS(p *prober) *Signature {
	return zfsIn(p, 0, zfsLabel)
}

// findZFSAtEnd finds a pool's member whose first labels were overwritten. A file system
// at the start counts more: it was made later.
func findZFSAtEnd(p *prober) *Signature {
	last := p.size &^ (zfsLabel - 1)
	s := zfsIn(p, last-2*zfsLabel, last-zfsLabel)
	if s != nil {
		s.Damaged = "only the labels at its end are there"
	}
	return s
}

func zfsIn(p *prober, labels ...int64) *Signature {
	if p.size < zfsMin {
		return nil
	}
	for _, at := range labels {
		head := p.bytes(at+16<<10, 4)
		if head[0] != 1 || head[1] > 1 || p.covered(at+16<<10, zfsList) {
			continue
		}
		if s := zfsPool(p.bytes(at+16<<10, zfsList)); s != nil {
			return s
		}
	}
	return nil
}

// zfsPool reads a label's list; nil if it is none.
func zfsPool(b []byte) *Signature {
	s := &Signature{Type: "zfs_member", Usage: RAID, Array: &Array{Level: "ZFS pool"}}
	var guid, txg uint64
	state := ^uint64(0)
	depth := 0
	b = b[12:] // encoding, version and flags
	for range zfsPairs {
		if len(b) < 16 {
			break
		}
		size, nameLen := be.Uint32(b), be.Uint32(b[8:])
		if size == 0 {
			if depth == 0 {
				break
			}
			depth--
			b = b[8:]
			continue
		}
		padded := (uint64(nameLen) + 3) &^ 3
		if uint64(size) > uint64(len(b)) || padded+16 > uint64(size) {
			return nil
		}
		name, value := string(b[12:12+nameLen]), b[12+padded:size]
		kind := be.Uint32(value)
		if kind == 0 {
			return nil
		}
		if kind == xdrDirectory {
			if uint64(len(b)) < 12+padded+16 {
				return nil
			}
			depth++
			b = b[12+padded+16:]
			continue
		}
		if depth == 0 {
			switch {
			case kind == xdrString && len(value) >= 12:
				if n := be.Uint32(value[8:]); name == "name" && uint64(n) <= uint64(len(value)-12) {
					s.Label = text(value[12 : 12+n])
				}
			case kind == xdrUint64 && len(value) >= 16:
				switch n := be.Uint64(value[8:]); name {
				case "pool_guid":
					s.UUID = fmt.Sprint(n)
				case "guid":
					guid, s.MemberUUID = n, fmt.Sprint(n)
				case "version":
					s.Version = fmt.Sprint(n)
				case "state":
					state = n
				case "txg":
					txg = n
				}
			}
		}
		b = b[size:]
	}
	const spare, cache, last = 3, 4, 7
	if guid == 0 || state > last || txg == 0 && state != spare && state != cache {
		return nil
	}
	return s
}

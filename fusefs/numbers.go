package fusefs

import (
	"sync"

	"github.com/cespare/xxhash/v2"
)

// Inode numbers of the mount, 64 bits:
//
//	1                          the root
//	1 | hash of a path (63)    virtual directories and files
//	0 | volume (23) | file (40) files inside a volume, by their own numbers
//
// volume is a hash of the recovery point and the volume's name, so the numbers are the same
// after the next mount; if two collide, the later one takes the next free. Files with numbers
// over 39 bits, on file systems of hundreds of TiB, get numbers in order of use, with the
// highest of the 40 bits set.
const (
	fileBits   = 40
	volumeBits = 23
	fileLate   = uint64(1) << (fileBits - 1)
	madeUp     = uint64(1) << 63
)

// numbers allocates numbers that are unique within one mount.
type numbers struct {
	mu      sync.Mutex
	made    map[uint64]string
	volumes map[uint64]string
}

// path returns the number of a virtual file with a key.
func (n *numbers) path(key string) uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.made == nil {
		n.made = map[uint64]string{}
	}
	return madeUp | claim(n.made, key, madeUp-1)
}

// volume returns the range of numbers of a volume.
func (n *numbers) volume(key string) uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.volumes == nil {
		n.volumes = map[uint64]string{}
	}
	return claim(n.volumes, key, 1<<volumeBits-1) << fileBits
}

// claim returns the first number, from the key's hash on, that is free or already the key's.
// 0 is for the root.
func claim(taken map[uint64]string, key string, mask uint64) uint64 {
	for h := xxhash.Sum64String(key) & mask; ; h = (h + 1) & mask {
		if other, ok := taken[h]; h != 0 && (!ok || other == key) {
			taken[h] = key
			return h
		}
	}
}

// fileNumbers allocates the numbers of one volume's files.
type fileNumbers struct {
	base uint64
	mu   sync.Mutex
	late map[uint64]uint64
}

func (n *fileNumbers) of(ino uint64) uint64 {
	if ino < fileLate {
		return n.base | ino
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.late == nil {
		n.late = map[uint64]uint64{}
	}
	number, ok := n.late[ino]
	if !ok {
		number = uint64(len(n.late))
		n.late[ino] = number
	}
	return n.base | fileLate | number
}

package probe

import (
	"fmt"
	"strings"
	"time"
)

// Array describes one member of an array, as far as its own metadata says.
type Array struct {
	Level   string // "raid1", "raid10", "linear", …; "mirror" for DRBD
	Devices int    // that the array has
	// Mirror says that every member holds the whole content by itself. It then lies in
	// DataSize bytes at DataOffset. It can be older than what other members hold.
	Mirror               bool
	DataOffset, DataSize int64
	// Unusable says why this member holds no content of its own even in a mirror: it is
	// a spare, was failing, or its rebuild was not finished.
	Unusable string
	Events   uint64    // changes of the array's state that this member saw; 0 if unknown
	Updated  time.Time // when this member was last current; zero if unknown
}

// Linux RAID (linux/raid/md_p.h): version 0.90 in the last 64 KiB-aligned 64 KiB, in the
// byte order of the machine; 1.0 between 8 and 12 KiB before the end, 1.1 at the start,
// 1.2 at 4 KiB.
const (
	mdMagic    = 0xa92b4efc
	mdReserved = 64 << 10

	mdFeatureRecovery = 2
	mdFeatureReshape  = 4
)

func findMD(p *prober) *Signature {
	if s := findMD090(p); s != nil {
		return s
	}
	for _, place := range []struct {
		version string
		at      int64
	}{{"1.0", p.size&^0xfff - 0x2000}, {"1.1", 0}, {"1.2", 0x1000}} {
		if s := findMD1(p, place.at, place.version); s != nil {
			return s
		}
	}
	return nil
}

func findMD090(p *prober) *Signature {
	at := p.size&^(mdReserved-1) - mdReserved
	if at <= 0 {
		return nil
	}
	b := p.bytes(at, 4096)
	word := func(i int) uint32 { return le.Uint32(b[4*i:]) }
	if word(0) != mdMagic {
		if be.Uint32(b) != mdMagic {
			return nil
		}
		word = func(i int) uint32 { return be.Uint32(b[4*i:]) }
	}
	// Words 1 to 3 are the version, 0.90.x or older 0.36 to 0.42 without a full UUID. Word 8
	// is the size of a member in KiB.
	size := int64(word(8)) << 10
	if word(1) != 0 || word(2) > 99 || size > at || p.covered(at, mdReserved) {
		return nil
	}
	s := &Signature{
		Type: "linux_raid_member", Usage: RAID,
		Version: fmt.Sprintf("%d.%d.%d", word(1), word(2), word(3)),
		UUID:    fmt.Sprintf("%08x-%04x-%04x-%04x-%04x%08x", word(5), word(13)>>16, word(13)&0xffff, word(14)>>16, word(14)&0xffff, word(15)),
	}
	sum := uint64(0)
	for i := range 1024 {
		if i != 38 {
			sum += uint64(word(i))
		}
	}
	s.Damaged = unless(uint32(sum>>32+sum&0xffffffff) == word(38), badChecksum)
	a := &Array{
		Level: mdLevel(int32(word(7))), Devices: int(word(10)), DataSize: at,
		Events: uint64(word(39))<<32 | uint64(word(40)), Updated: time.Unix(int64(word(32)), 0).UTC(),
	}
	if le.Uint32(b) == mdMagic { // the two halves of the count follow the byte order
		a.Events = uint64(word(40))<<32 | uint64(word(39))
	}
	if size > 0 { // it is 0 where members may differ
		a.DataSize = size
	}
	const thisDisk, faulty, active, inSync = 992, 1, 2, 4
	switch state := word(thisDisk + 4); {
	case state&faulty != 0:
		a.Unusable = "it is marked as failed"
	case state&active == 0:
		a.Unusable = "it is a spare"
	case state&inSync == 0:
		a.Unusable = "its rebuild was not finished"
	}
	a.mirrorOf(word(7) == 1)
	s.Array = a
	return s
}

func findMD1(p *prober, at int64, version string) *Signature {
	if at < 0 || at+256 > p.size {
		return nil
	}
	b := p.bytes(at, 256)
	if le.Uint32(b) != mdMagic || le.Uint32(b[4:]) != 1 || le.Uint64(b[144:]) != uint64(at)/512 {
		return nil
	}
	s := &Signature{
		Type: "linux_raid_member", Usage: RAID, Version: version,
		UUID: uuid(b[16:]), MemberUUID: uuid(b[168:]), Label: text(b[32:64]),
		Damaged: unless(mdChecksum(p, at), badChecksum),
	}
	features, level, disks := le.Uint32(b[8:]), int32(le.Uint32(b[72:])), le.Uint32(b[92:])
	offset, size := le.Uint64(b[128:]), le.Uint64(b[136:])
	a := &Array{
		Level: mdLevel(level), Devices: int(disks), Events: le.Uint64(b[200:]),
		Updated: time.Unix(int64(le.Uint64(b[192:])&(1<<40-1)), 0).UTC(),
	}
	// The array's own size counts: data_size is what it could grow to.
	if used := le.Uint64(b[80:]); used > 0 {
		size = min(size, used)
	}
	switch {
	case offset > uint64(p.size)/512 || size > uint64(p.size)/512-offset || size == 0:
		a.Unusable = "its metadata contradicts its size"
	default:
		a.DataOffset, a.DataSize = int64(offset)*512, int64(size)*512
	}
	const faulty, spare = 0xfffe, 0xffff
	number := le.Uint32(b[160:])
	switch role := le.Uint16(p.bytes(at+256+2*int64(min(number, 1<<12)), 2)); {
	case a.Unusable != "":
	case number >= le.Uint32(b[220:]) || role == spare:
		a.Unusable = "it is a spare"
	case role == faulty:
		a.Unusable = "it is marked as failed"
	case uint32(role) >= disks:
		a.Unusable = "it holds a journal, not data"
	case features&mdFeatureRecovery != 0:
		a.Unusable = "its rebuild was not finished"
	case features&mdFeatureReshape != 0:
		a.Unusable = "a change of the array's shape was not finished"
	}
	a.mirrorOf(level == 1)
	s.Array = a
	return s
}

// mirrorOf marks the array as readable from one member, where it is.
func (a *Array) mirrorOf(mirror bool) { a.Mirror = mirror && a.Unusable == "" }

// mdChecksum is the sum of 32-bit words (and of a last half), folded, without its own word.
func mdChecksum(p *prober, at int64) bool {
	roles := le.Uint32(p.bytes(at+220, 4))
	if roles > 1<<12 {
		return false
	}
	b := p.bytes(at, 256+2*int(roles))
	want := le.Uint32(b[216:])
	sum := -uint64(want)
	for ; len(b) >= 4; b = b[4:] {
		sum += uint64(le.Uint32(b))
	}
	if len(b) == 2 {
		sum += uint64(le.Uint16(b))
	}
	return uint32(sum>>32+sum&0xffffffff) == want
}

func mdLevel(level int32) string {
	switch level {
	case -1:
		return "linear"
	case -4:
		return "multipath"
	case -5:
		return "faulty"
	}
	return fmt.Sprintf("raid%d", level)
}

// Describe says in a few words which array the member belongs to.
func (a *Array) Describe() string {
	var b strings.Builder
	b.WriteString(a.Level)
	if a.Devices > 0 {
		fmt.Fprintf(&b, " of %d devices", a.Devices)
	}
	return b.String()
}

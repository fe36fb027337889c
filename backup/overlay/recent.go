package overlay

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
)

// The file named recent holds the changes of the map since the last flush, little-endian:
//
//	header  8 "VARVEREC", 4 version, 16 ID of the overlay, 36 boot ID of the machine,
//	        4 CRC-32C of all before; padded to 4096 bytes
//	areas   two, of areaSlots slots
//	slot    8 sequence number, 8 first granule, 8 count in the low 56 bits and state in
//	        the high 8, 4 CRC-32C of all before, 4 zero
//
// A change is in a slot before it is acknowledged. The file is in the page cache and is never
// synced: it survives the process, for a client such as a kernel that reconnects and expects
// its writes. It must not survive the machine, since a slot might reach the disk without its
// data: the boot ID detects that.
//
// Slots are filled in the order of their sequence numbers. A flush switches to the other
// area, once everything in that one is in the map: together they always hold the newest
// changes without a gap, and applying all of them again over a map that has some already
// leads to the same states.
const (
	recentMagic   = "VARVEREC"
	recentVersion = 1
	recentHeader  = 4096
	slotSize      = 32
	// areaSlots bounds the changes that are not in the map. At half of it a write flushes.
	areaSlots = 1 << 18
	areaSize  = areaSlots * slotSize
	// growBy is how much space of an area is allocated at once.
	growBy    = 256 << 10
	growSlots = growBy / slotSize
	// bootIDSize is the length of the text in bootIDFile.
	bootIDSize = 36
	bootIDFile = "/proc/sys/kernel/random/boot_id"
)

// errRecentFull means that flushes have failed for want of space until an area was full.
var errRecentFull = fmt.Errorf("its latest changes could not be flushed: %w", syscall.ENOSPC)

// recent is the open file. Its user serializes calls.
type recent struct {
	file *os.File
	mem  []byte // the mapped file; nil if the file system cannot map it, which is slower

	seq  uint64 // of the next change
	area int    // that is being filled
	used [2]int64
	room [2]int64 // slots with space on disk
	free bool     // the other area holds nothing that is not in the map
}

// recentHead returns the header for an overlay on this machine in this boot.
func recentHead(id overlayID, boot string) []byte {
	b := make([]byte, 0, recentHeader)
	b = append(b, recentMagic...)
	b = binary.LittleEndian.AppendUint32(b, recentVersion)
	b = append(b, id[:]...)
	b = append(b, boot...)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return b[:recentHeader]
}

// bootID identifies this boot of the machine.
func bootID() string {
	b, err := os.ReadFile(bootIDFile)
	if b = bytes.TrimSpace(b); err == nil && len(b) == bootIDSize {
		return string(b)
	}
	// Without it nothing can be trusted after a restart of the process: no other process has
	// this text.
	return (rand.Text() + rand.Text())[:bootIDSize]
}

// openRecent opens the file in an overlay's directory, or makes one, and returns the changes
// in it: none if they belong to another overlay or the machine was restarted since.
func openRecent(dir *os.Root, id overlayID, granules int64) (*recent, []stateRun, error) {
	f, err := dir.OpenFile(recentFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("open the overlay's latest changes: %w", err)
	}
	r := &recent{file: f, seq: 1, free: true}
	runs, err := r.load(recentHead(id, bootID()), granules)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open the overlay's latest changes: %w", err), f.Close())
	}
	r.mem, err = unix.Mmap(int(f.Fd()), 0, recentHeader+2*areaSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		r.mem = nil
	}
	return r, runs, nil
}

// load reads what the file holds.
func (r *recent) load(head []byte, granules int64) ([]stateRun, error) {
	got := make([]byte, len(head))
	if _, err := r.file.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if !bytes.Equal(got, head) {
		if err := r.file.Truncate(0); err != nil {
			return nil, err
		}
		_, err := r.file.WriteAt(head, 0)
		return nil, err
	}
	var areas [2][]stateRun
	var first [2]uint64
	for i := range areas {
		var err error
		b := io.NewSectionReader(r.file, recentHeader+int64(i)*areaSize, areaSize)
		if areas[i], first[i], err = readArea(b, granules); err != nil {
			return nil, err
		}
		r.used[i] = int64(len(areas[i]))
		r.room[i] = r.used[i] / growSlots * growSlots
	}
	if r.used[0]+r.used[1] == 0 {
		return nil, nil
	}
	if r.area = 0; first[1] > first[0] {
		r.area = 1
	}
	r.seq = first[r.area] + uint64(r.used[r.area])
	// It is unknown how much of them is in the map.
	r.free = false
	other := 1 - r.area
	if r.used[other] > 0 && first[other]+uint64(r.used[other]) == first[r.area] {
		return append(areas[other], areas[r.area]...), nil
	}
	return areas[r.area], nil
}

// readArea reads the changes in an area and the sequence number of the first.
func readArea(rd io.Reader, granules int64) (runs []stateRun, first uint64, err error) {
	b := make([]byte, growBy)
	for {
		n, err := io.ReadFull(rd, b)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, 0, err
		}
		for at := 0; at+slotSize <= n; at += slotSize {
			seq, run, ok := decodeSlot(b[at:at+slotSize], granules)
			if !ok || len(runs) > 0 && seq != first+uint64(len(runs)) {
				return runs, first, nil
			}
			if len(runs) == 0 {
				first = seq
			}
			runs = append(runs, run)
		}
		if n < len(b) {
			return runs, first, nil
		}
	}
}

func encodeSlot(b *[slotSize]byte, seq uint64, r stateRun) {
	binary.LittleEndian.PutUint64(b[:], seq)
	binary.LittleEndian.PutUint64(b[8:], uint64(r.start))
	binary.LittleEndian.PutUint64(b[16:], uint64(r.count)|uint64(r.state)<<56)
	binary.LittleEndian.PutUint32(b[24:], crc32.Checksum(b[:24], castagnoli))
}

// decodeSlot decodes a slot; false if it is empty, torn, or not of an image of this size.
func decodeSlot(b []byte, granules int64) (seq uint64, r stateRun, ok bool) {
	seq = binary.LittleEndian.Uint64(b)
	if seq == 0 || binary.LittleEndian.Uint32(b[24:]) != crc32.Checksum(b[:24], castagnoli) {
		return 0, r, false
	}
	r, ok = decodeRun(b[8:], granules)
	return seq, r, ok
}

// add records a change. It survives this process when add returns.
func (r *recent) add(run stateRun) error {
	slot := r.used[r.area]
	if slot == areaSlots {
		return errRecentFull
	}
	if slot >= r.room[r.area] {
		if err := r.grow(); err != nil {
			return fmt.Errorf("make room for its latest changes: %w", err)
		}
	}
	var b [slotSize]byte
	encodeSlot(&b, r.seq, run)
	if err := r.put(&b, recentHeader+int64(r.area)*areaSize+slot*slotSize); err != nil {
		return err
	}
	r.used[r.area]++
	r.seq++
	return nil
}

// put stores a slot. A store to the mapped file needs no system call; it faults if the file
// system allocates new space for every write and has none.
func (r *recent) put(b *[slotSize]byte, off int64) (err error) {
	if r.mem == nil {
		_, err = r.file.WriteAt(b[:], off)
		return err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			if _, ok := p.(runtime.Error); !ok {
				panic(p)
			}
			err = fmt.Errorf("note its latest changes: %w", syscall.ENOSPC)
		}
	}()
	copy(r.mem[off:], b[:])
	return nil
}

// grow allocates the next slots, so that storing to them needs no space.
func (r *recent) grow() error {
	off := recentHeader + int64(r.area)*areaSize + r.room[r.area]*slotSize
	err := unix.Fallocate(int(r.file.Fd()), 0, off, growBy)
	if errors.Is(err, unix.EOPNOTSUPP) {
		b := make([]byte, growBy)
		if _, err = r.file.ReadAt(b, off); err == nil || errors.Is(err, io.EOF) {
			_, err = r.file.WriteAt(b, off)
		}
	}
	if err != nil {
		return err
	}
	r.room[r.area] += growSlots
	return nil
}

// full reports whether a flush is due.
func (r *recent) full() bool { return r.used[r.area] >= areaSlots/2 }

// turn directs later changes to the other area, if it is free, when a flush begins.
func (r *recent) turn() {
	if r.free && r.used[r.area] > 0 {
		r.area = 1 - r.area
		r.used[r.area], r.free = 0, false
	}
}

// flushed records that what was added before the last turn is in the map.
func (r *recent) flushed() { r.free = true }

// forget makes sure that the file is not trusted again.
func (r *recent) forget() {
	_, _ = r.file.WriteAt(make([]byte, recentHeader), 0)
}

func (r *recent) close() error {
	var err error
	if r.mem != nil {
		err = unix.Munmap(r.mem)
		r.mem = nil
	}
	return errors.Join(err, r.file.Close())
}

// removeRecent removes the file, if it exists.
func removeRecent(dir *os.Root) error {
	if err := dir.Remove(recentFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the overlay's latest changes: %w", err)
	}
	return nil
}

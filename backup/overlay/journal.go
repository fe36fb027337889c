package overlay

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// The map file is a header and frames, little-endian:
//
//	header  8 "VARVEOVL", 4 version, 4 granule, 8 image size,
//	        4 length of base identity, the identity, 4 CRC-32C of all before
//	frame   4 "FRAM", 4 number of runs, 8 sequence number from 1,
//	        per run: 8 first granule, 8 count in the low 56 bits and state
//	        in the high 8; 4 CRC-32C of all before
//
// A frame holds what one flush made durable. Later runs win. Reading stops at
// the first frame that is not whole: it was being written when the end came,
// and no flush that needed it had returned.
const (
	mapMagic   = "VARVEOVL"
	mapVersion = 1
	frameMagic = "FRAM"
	maxBaseID  = 4096
	// maxFrameRuns bounds a frame, and so what reading one allocates.
	maxFrameRuns = 1 << 16
	// fullRuns of changes not flushed make a write flush by itself.
	fullRuns = 1 << 18
	// rewriteFrom is the size below which a map is never rewritten.
	rewriteFrom = 1 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header binds a map to its image.
type header struct {
	size   int64
	baseID string
}

func (h header) encode() []byte {
	b := []byte(mapMagic)
	b = binary.LittleEndian.AppendUint32(b, mapVersion)
	b = binary.LittleEndian.AppendUint32(b, Granule)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.size))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(h.baseID)))
	b = append(b, h.baseID...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// BaseOf reads which image the overlay in a directory was made over.
func BaseOf(dir string) (baseID string, size int64, err error) {
	f, err := os.Open(filepath.Join(dir, "map"))
	if err != nil {
		return "", 0, fmt.Errorf("open the overlay's map: %w", err)
	}
	defer f.Close()
	head := make([]byte, 28)
	if _, err := io.ReadFull(f, head); err != nil {
		return "", 0, fmt.Errorf("read the overlay's map: %w", err)
	}
	n := binary.LittleEndian.Uint32(head[24:])
	if n > maxBaseID {
		return "", 0, fmt.Errorf("read the overlay's map: a base identity of %d bytes", n)
	}
	id := make([]byte, n)
	if _, err := io.ReadFull(f, id); err != nil {
		return "", 0, fmt.Errorf("read the overlay's map: %w", err)
	}
	h := header{size: int64(binary.LittleEndian.Uint64(head[16:])), baseID: string(id)}
	sum := make([]byte, 4)
	if _, err := io.ReadFull(f, sum); err != nil || !bytes.Equal(h.encode(), slices.Concat(head, id, sum)) {
		return "", 0, errors.New("read the overlay's map: its header is not whole, or of another version")
	}
	return h.baseID, h.size, nil
}

// encodeFrame is the frame of at most maxFrameRuns runs.
func encodeFrame(seq uint64, runs []stateRun) []byte {
	b := make([]byte, 0, 20+16*len(runs))
	b = append(b, frameMagic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(runs)))
	b = binary.LittleEndian.AppendUint64(b, seq)
	for _, r := range runs {
		b = binary.LittleEndian.AppendUint64(b, uint64(r.start))
		b = binary.LittleEndian.AppendUint64(b, uint64(r.count)|uint64(r.state)<<56)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// errTorn ends reading a map at a frame that is not whole.
var errTorn = errors.New("frame is not whole")

// readMap reads a map, calls apply for each run, and returns the length of its
// whole frames, header included, and the last sequence number.
func readMap(rd io.Reader, want header, apply func(stateRun)) (end int64, seq uint64, err error) {
	r := bufio.NewReaderSize(rd, 64<<10)
	head := want.encode()
	got := make([]byte, len(head))
	if n, err := io.ReadFull(r, got); err != nil {
		if n >= len(mapMagic) && string(got[:8]) == mapMagic {
			return 0, 0, ErrOtherBase // a shorter identity
		}
		return 0, 0, fmt.Errorf("read the overlay's map: %w", err)
	}
	if string(got[:8]) != mapMagic {
		return 0, 0, errors.New("the file named map is no overlay's map")
	}
	if v := binary.LittleEndian.Uint32(got[8:]); v != mapVersion {
		return 0, 0, fmt.Errorf("the overlay's map has format %d, not %d: it was made by another version of this program", v, mapVersion)
	}
	if !bytes.Equal(got, head) {
		return 0, 0, ErrOtherBase
	}
	end = int64(len(head))
	for {
		n, err := readFrame(r, seq+1, want.size, apply)
		if err != nil {
			if errors.Is(err, errTorn) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return end, seq, nil
			}
			return 0, 0, fmt.Errorf("read the overlay's map: %w", err)
		}
		end += n
		seq++
	}
}

// readFrame reads one frame and applies it if it is whole.
func readFrame(r io.Reader, seq uint64, size int64, apply func(stateRun)) (int64, error) {
	var h [16]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, err
	}
	count := binary.LittleEndian.Uint32(h[4:])
	if string(h[:4]) != frameMagic || count > maxFrameRuns || binary.LittleEndian.Uint64(h[8:]) != seq {
		return 0, errTorn
	}
	body := make([]byte, 16*int(count)+4)
	if _, err := io.ReadFull(r, body); err != nil {
		return 0, err
	}
	sum := crc32.Update(crc32.Checksum(h[:], castagnoli), castagnoli, body[:len(body)-4])
	if binary.LittleEndian.Uint32(body[len(body)-4:]) != sum {
		return 0, errTorn
	}
	granules := uint64(size+Granule-1) / Granule
	runs := make([]stateRun, count)
	for i := range runs {
		start := binary.LittleEndian.Uint64(body[16*i:])
		n := binary.LittleEndian.Uint64(body[16*i+8:])
		s := state(n >> 56)
		n &= 1<<56 - 1
		if start > granules || n > granules-start || s > isZero {
			return 0, errTorn
		}
		runs[i] = stateRun{start: int64(start), count: int64(n), state: s}
	}
	for _, x := range runs {
		apply(x)
	}
	return int64(len(h) + len(body)), nil
}

// journal is the open map file and the changes not in it yet.
type journal struct {
	path string
	head header
	file *os.File
	end  int64 // of the whole frames; used by one flush at a time
	seq  uint64
	base int64 // size after the last rewrite

	mu      sync.Mutex
	pending []stateRun
}

// openJournal reads the map at path, or makes an empty one.
func openJournal(path string, h header, apply func(stateRun)) (*journal, error) {
	j := &journal{path: path, head: h}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return j, j.rewrite(func(func(stateRun)) {})
	}
	if err != nil {
		return nil, fmt.Errorf("open the overlay's map: %w", err)
	}
	if j.end, j.seq, err = readMap(f, h, apply); err != nil {
		_ = f.Close()
		return nil, err
	}
	j.file, j.base = f, j.end
	return j, nil
}

func (j *journal) close() error { return j.file.Close() }

// add notes a change whose bytes are in data.
func (j *journal) add(r stateRun) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if n := len(j.pending); n > 0 {
		if last := &j.pending[n-1]; last.state == r.state && last.start+last.count == r.start {
			last.count += r.count
			return
		}
	}
	j.pending = append(j.pending, r)
}

// full tells whether a flush is due for want of memory.
func (j *journal) full() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.pending) >= fullRuns
}

// take returns the changes noted so far and forgets them.
func (j *journal) take() []stateRun {
	j.mu.Lock()
	defer j.mu.Unlock()
	p := j.pending
	j.pending = nil
	return p
}

// append makes changes durable.
func (j *journal) append(runs []stateRun) error {
	if len(runs) == 0 {
		return nil
	}
	for len(runs) > 0 {
		n := min(len(runs), maxFrameRuns)
		b := encodeFrame(j.seq+1, runs[:n])
		if _, err := j.file.WriteAt(b, j.end); err != nil {
			return err
		}
		j.end += int64(len(b))
		j.seq++
		runs = runs[n:]
	}
	if err := unix.Fdatasync(int(j.file.Fd())); err != nil {
		return fmt.Errorf("%w: %w", errSync, err)
	}
	return nil
}

// errSync marks a failed sync, after which the file's content is unknown.
var errSync = errors.New("sync failed")

// restore puts back changes that were taken and could not be written.
func (j *journal) restore(runs []stateRun) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pending = append(runs, j.pending...)
}

// wantsRewrite tells whether the log has outgrown what it says.
func (j *journal) wantsRewrite() bool { return j.end > max(rewriteFrom, 2*j.base) }

// rewrite replaces the map by one that says all runs once.
func (j *journal) rewrite(all func(func(stateRun))) error {
	tmp := j.path + ".new"
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	n := &journal{file: f}
	err = n.fill(j.head, all)
	if err == nil {
		err = os.Rename(tmp, j.path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(j.path))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if j.file != nil {
		_ = j.file.Close()
	}
	j.file, j.end, j.seq, j.base = f, n.end, n.seq, n.end
	return nil
}

// fill writes a whole new map.
func (j *journal) fill(h header, all func(func(stateRun))) error {
	b := h.encode()
	if _, err := j.file.WriteAt(b, 0); err != nil {
		return err
	}
	j.end = int64(len(b))
	var runs []stateRun
	var err error
	all(func(r stateRun) {
		if runs = append(runs, r); len(runs) == maxFrameRuns && err == nil {
			err = j.append(runs)
			runs = runs[:0]
		}
	})
	if err == nil {
		err = j.append(runs)
	}
	return errors.Join(err, j.file.Sync())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

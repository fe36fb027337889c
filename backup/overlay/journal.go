package overlay

import (
	"bufio"
	"bytes"
	"crypto/rand"
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
//	        4 length of base identity, the identity, 16 ID of the overlay (not in
//	        version 1), 4 CRC-32C of all before
//	frame   4 "FRAM", 4 number of runs, 8 sequence number from 1,
//	        per run: 8 first granule, 8 count in the low 56 bits and state
//	        in the high 8; 4 CRC-32C of all before
//
// A frame holds what one flush made durable. Later runs win. Reading stops at the first
// incomplete frame: a crash interrupted its write, and no flush that needed it had returned.
// Changes since the last flush are in the file named recent.
const (
	mapMagic   = "VARVEOVL"
	mapVersion = 2
	frameMagic = "FRAM"
	maxBaseID  = 4096
	// maxFrameRuns bounds a frame, and so the memory to read one.
	maxFrameRuns = 1 << 16
	// rewriteFrom is the size below which a map is never rewritten.
	rewriteFrom = 1 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// overlayID identifies an overlay, whatever its image.
type overlayID [16]byte

func newOverlayID() (id overlayID) {
	_, _ = rand.Read(id[:]) // never fails
	return id
}

// header binds a map to its image.
type header struct {
	version uint32
	size    int64
	baseID  string
	id      overlayID // zero in version 1
}

func (h header) encode() []byte {
	b := []byte(mapMagic)
	b = binary.LittleEndian.AppendUint32(b, h.version)
	b = binary.LittleEndian.AppendUint32(b, Granule)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.size))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(h.baseID)))
	b = append(b, h.baseID...)
	if h.version > 1 {
		b = append(b, h.id[:]...)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// readHeader reads the header of a map.
func readHeader(r io.Reader) (h header, err error) {
	head := make([]byte, 28)
	if _, err := io.ReadFull(r, head); err != nil {
		return h, fmt.Errorf("read the overlay's map: %w", err)
	}
	if string(head[:8]) != mapMagic {
		return h, errors.New("the file \"map\" is not an overlay's map")
	}
	h.version = binary.LittleEndian.Uint32(head[8:])
	if h.version < 1 || h.version > mapVersion {
		return h, fmt.Errorf("the overlay's map has format %d, not %d: it was made by another version of this program", h.version, mapVersion)
	}
	n := binary.LittleEndian.Uint32(head[24:])
	if n > maxBaseID {
		return h, fmt.Errorf("read the overlay's map: a base identity of %d bytes", n)
	}
	rest := make([]byte, int(n)+len(h.id)+4)
	if h.version == 1 {
		rest = rest[:n+4]
	}
	if _, err := io.ReadFull(r, rest); err != nil {
		return h, fmt.Errorf("read the overlay's map: %w", err)
	}
	h.size, h.baseID = int64(binary.LittleEndian.Uint64(head[16:])), string(rest[:n])
	if h.version > 1 {
		copy(h.id[:], rest[n:])
	}
	if !bytes.Equal(h.encode(), slices.Concat(head, rest)) {
		return h, errors.New("read the overlay's map: its header is damaged")
	}
	return h, nil
}

// BaseOf returns the identity and size of the image under an overlay.
func BaseOf(at Options) (baseID string, size int64, err error) {
	f, err := os.OpenInRoot(at.Dir, filepath.Join(at.Name, mapFile))
	if err != nil {
		return "", 0, fmt.Errorf("open the overlay's map: %w", err)
	}
	defer f.Close()
	h, err := readHeader(f)
	return h.baseID, h.size, err
}

// encodeFrame encodes a frame of at most maxFrameRuns runs.
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

// errTorn means that a frame is incomplete.
var errTorn = errors.New("frame is not whole")

// readMap reads the map of an image, calls apply for each run, and returns its header, the
// length of its complete frames, header included, and the last sequence number.
func readMap(rd io.Reader, want header, apply func(stateRun)) (h header, end int64, seq uint64, err error) {
	r := bufio.NewReaderSize(rd, 64<<10)
	if h, err = readHeader(r); err != nil {
		return h, 0, 0, err
	}
	if h.size != want.size || h.baseID != want.baseID {
		return h, 0, 0, ErrOtherBase
	}
	end = int64(len(h.encode()))
	for {
		n, err := readFrame(r, seq+1, h.size, apply)
		if err != nil {
			if errors.Is(err, errTorn) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return h, end, seq, nil
			}
			return h, 0, 0, fmt.Errorf("read the overlay's map: %w", err)
		}
		end += n
		seq++
	}
}

// readFrame reads one frame and applies it if it is complete.
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
	runs := make([]stateRun, count)
	for i := range runs {
		var ok bool
		if runs[i], ok = decodeRun(body[16*i:], granulesOf(size)); !ok {
			return 0, errTorn
		}
	}
	for _, x := range runs {
		apply(x)
	}
	return int64(len(h) + len(body)), nil
}

// decodeRun reads a run; false if it reaches beyond the image.
func decodeRun(b []byte, granules int64) (stateRun, bool) {
	start, n := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	s := state(n >> 56)
	n &= 1<<56 - 1
	if start > uint64(granules) || n > uint64(granules)-start || s > isZero {
		return stateRun{}, false
	}
	return stateRun{start: int64(start), count: int64(n), state: s}, true
}

// journal is the open map file and the changes not in it yet.
type journal struct {
	dir  *os.Root
	head header
	file *os.File
	end  int64 // of the complete frames; used by
	seq  uint64
	base int64 // size after the last rewrite

	mu      sync.Mutex
	pending []stateRun // what recent holds and the map may not
	recent  *recent
}

// openJournal reads the map and the changes since its last flush from a directory, or makes
// an empty map. The caller rewrites a map of an earlier version.
func openJournal(dir *os.Root, h header, apply func(stateRun)) (*journal, error) {
	j := &journal{dir: dir, head: h}
	f, err := dir.OpenFile(mapFile, os.O_RDWR, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		j.head.version, j.head.id = mapVersion, newOverlayID()
		if err := j.rewrite(func(func(stateRun)) {}); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, fmt.Errorf("open the overlay's map: %w", err)
	default:
		if j.head, j.end, j.seq, err = readMap(f, h, apply); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		j.file, j.base = f, j.end
	}
	if j.head.version == 1 { // it had no such changes
		j.head.id = newOverlayID()
		if err := removeRecent(j.dir); err != nil {
			return nil, errors.Join(err, j.file.Close())
		}
	}
	j.recent, j.pending, err = openRecent(j.dir, j.head.id, granulesOf(h.size))
	if err != nil {
		return nil, errors.Join(err, j.file.Close())
	}
	for _, r := range j.pending {
		apply(r)
	}
	return j, nil
}

// close closes the files. If everything is flushed, it removes the file of recent changes.
func (j *journal) close(flushed bool) error {
	var err error
	if flushed {
		err = removeRecent(j.dir)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return errors.Join(err, j.recent.close(), j.file.Close())
}

// add records a change whose bytes are in data. It survives this process when add returns.
func (j *journal) add(r stateRun) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.recent.add(r); err != nil {
		return err
	}
	if n := len(j.pending); n > 0 {
		if last := &j.pending[n-1]; last.state == r.state && last.start+last.count == r.start {
			last.count += r.count
			return nil
		}
	}
	j.pending = append(j.pending, r)
	return nil
}

// full reports whether a flush is due: the changes that are not in the map are bounded.
func (j *journal) full() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.recent.full()
}

// take returns the recorded changes and forgets them.
func (j *journal) take() []stateRun {
	j.mu.Lock()
	defer j.mu.Unlock()
	p := j.pending
	j.pending = nil
	j.recent.turn()
	return p
}

// flushed records that the changes taken are in the map and durable.
func (j *journal) flushed() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.recent.flushed()
}

// forget drops the changes that are not in the map, for a later process, too.
func (j *journal) forget() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.recent.forget()
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

// restore adds back changes that were taken and could not be written.
func (j *journal) restore(runs []stateRun) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pending = append(runs, j.pending...)
}

// wantsRewrite reports whether the log is much longer than its content.
func (j *journal) wantsRewrite() bool { return j.end > max(rewriteFrom, 2*j.base) }

// rewrite replaces the map by one with each run once.
func (j *journal) rewrite(all func(func(stateRun))) error {
	const tmp = mapFile + ".new"
	f, err := j.dir.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	n := &journal{file: f}
	err = n.fill(j.head, all)
	if err == nil {
		err = j.dir.Rename(tmp, mapFile)
	}
	if err != nil { // the map has not changed
		return errors.Join(err, f.Close(), j.dir.Remove(tmp))
	}
	if err := syncDir(j.dir); err != nil {
		return errors.Join(fmt.Errorf("%w: %w", errSync, err), f.Close())
	}
	if j.file != nil {
		_ = j.file.Close()
	}
	j.file, j.end, j.seq, j.base = f, n.end, n.seq, n.end
	return nil
}

// fill writes a complete new map.
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

func syncDir(dir *os.Root) error {
	d, err := dir.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

package ext4

import (
	"io"
	"syscall"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// run is a range of a file's blocks that are all holes, or lie together on the
// volume.
type run struct {
	start, count uint64 // in blocks of the file; count > 0
	block        uint64 // first block on the volume; 0 for what reads as zeroes
}

// noLimit ends the hole after the last mapped block.
const noLimit = uint64(1) << 62

// lookupRun gives the run that holds a block of the file.
func (n *inode) lookupRun(lblk uint64) (run, error) {
	var r run
	var err error
	if n.has(flagExtents) {
		r, err = n.lookupExtent(lblk)
	} else {
		r, err = n.lookupBlockMap(lblk)
	}
	if err != nil {
		return run{}, err
	}
	if r.block != 0 && (r.block <= n.fs.sb.firstDataBlock || r.block >= n.fs.sb.blocks || r.count > n.fs.sb.blocks-r.block) {
		return run{}, n.unmapped(r.start+r.count, corrupt(n.where(), "file block %d maps to block %d, %d blocks long, of a volume of %d", r.start, r.block, r.count, n.fs.sb.blocks))
	}
	return r, nil
}

// readContent fills p from byte off of the mapped or inline content. It does not
// look at the size.
func (n *inode) readContent(p []byte, off int64) error {
	if n.has(flagInlineData) {
		data, err := n.inlineData()
		if err != nil && off+int64(len(p)) > int64(len(data)) {
			return err
		}
		clear(p)
		if off < int64(len(data)) {
			copy(p, data[off:])
		}
		return nil
	}
	bits := n.fs.sb.blockBits
	for len(p) > 0 {
		lblk := uint64(off) >> bits
		r, err := n.lookupRun(lblk)
		if err != nil {
			return err
		}
		left := r.count - (lblk - r.start) // blocks of the run from lblk on
		inBlock := off & (1<<bits - 1)
		want := len(p)
		if left < uint64(len(p))>>bits+2 {
			want = min(want, int(int64(left)<<bits-inBlock))
		}
		if r.block == 0 {
			clear(p[:want])
		} else {
			at := int64(r.block+lblk-r.start)<<bits + inBlock
			if err := n.fs.dev.readAt(p[:want], at); err != nil {
				return wrapWhere(n.where(), err)
			}
		}
		p, off = p[want:], off+int64(want)
	}
	return nil
}

// readable says why the content cannot be read as a file's.
func (n *inode) readable() error {
	switch n.typ() {
	case modeDir:
		return syscall.EISDIR
	case modeRegular:
		return n.refuseEncrypted()
	}
	return io.EOF
}

// ReadAt reads the content of a regular file, as io.ReaderAt.
func (n *inode) ReadAt(p []byte, off int64) (int, error) {
	if err := n.readable(); err != nil {
		return 0, err
	}
	switch {
	case off < 0:
		return 0, syscall.EINVAL
	case off >= n.size:
		return 0, io.EOF
	}
	var eof error
	if int64(len(p)) > n.size-off {
		p, eof = p[:n.size-off], io.EOF
	}
	if err := n.readContent(p, off); err != nil {
		return 0, err
	}
	return len(p), eof
}

// NextData finds the next range that is not a hole, as diskfs.ExtentFinder.
func (n *inode) NextData(off int64) (diskfs.Extent, error) {
	if err := n.readable(); err != nil {
		return diskfs.Extent{}, err
	}
	if off < 0 {
		return diskfs.Extent{}, syscall.EINVAL
	}
	if off >= n.size {
		return diskfs.Extent{}, io.EOF
	}
	if n.has(flagInlineData) {
		return diskfs.Extent{Offset: off, Length: n.size - off, Device: -1}, nil
	}
	bits := n.fs.sb.blockBits
	end := (uint64(n.size) + 1<<bits - 1) >> bits
	for lblk := uint64(off) >> bits; lblk < end; {
		r, err := n.lookupRun(lblk)
		if err != nil {
			return diskfs.Extent{}, err
		}
		if r.block == 0 {
			lblk = r.start + r.count
			continue
		}
		from := max(off, int64(r.start)<<bits)
		to := min(n.size, int64(min(r.start+r.count, end))<<bits)
		e := diskfs.Extent{Offset: from, Length: to - from, Device: int64(r.block)<<bits + from - int64(r.start)<<bits}
		if n.fs.dev.replayed(r.block, r.count) {
			e.Device = -1
		}
		return e, nil
	}
	return diskfs.Extent{}, io.EOF
}

package xfs

import (
	"io"
	"syscall"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// readAt reads a regular file at off >= 0. Other files are empty.
func (i *inode) readAt(p []byte, off int64) (int, error) {
	if !i.is(syscall.S_IFREG) || off >= i.stat.Size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	if i.realtime {
		return 0, unsupported("realtime device (inode %d keeps its data there)", i.stat.Ino)
	}
	var eof error
	if left := i.stat.Size - off; int64(len(p)) > left {
		p, eof = p[:left], io.EOF
	}
	done := 0
	for done < len(p) {
		n, err := i.readPiece(p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, eof
}

// readPiece reads what is contiguous on the volume or in a hole, at least one byte.
func (i *inode) readPiece(p []byte, off int64) (int, error) {
	log := i.fs.sb.blockLog
	blk := uint64(off) >> log
	e, ok, err := i.data.find(blk)
	if err != nil {
		return 0, err
	}
	if !ok {
		clear(p)
		return len(p), nil
	}
	until := e.end()
	hole := e.unwritten
	if e.off > blk {
		until, hole = e.off, true
	}
	// Counted from the block that holds off, since a hostile extent may end beyond
	// what an int64 can count in bytes.
	if blocks := until - blk; blocks < uint64(len(p)) {
		in := off - int64(blk<<log)
		p = p[:min(int64(len(p)), int64(blocks<<log)-in)]
	}
	if hole {
		clear(p)
		return len(p), nil
	}
	at := i.fs.extentOffset(e) + off - int64(e.off<<log)
	if err := i.fs.dev.readAt(p, at); err != nil {
		return 0, err
	}
	return len(p), nil
}

// nextData finds data in a regular file from off >= 0 on. Other files have none.
func (i *inode) nextData(off int64) (diskfs.Extent, error) {
	if !i.is(syscall.S_IFREG) {
		return diskfs.Extent{}, io.EOF
	}
	if i.realtime {
		return diskfs.Extent{}, unsupported("realtime device (inode %d keeps its data there)", i.stat.Ino)
	}
	log := i.fs.sb.blockLog
	for off < i.stat.Size {
		e, ok, err := i.data.find(uint64(off) >> log)
		if err != nil {
			return diskfs.Extent{}, err
		}
		last := uint64(i.stat.Size-1) >> log
		if !ok || e.off > last {
			break
		}
		end := i.stat.Size
		if e.end() <= last {
			end = int64(e.end() << log)
		}
		if e.unwritten {
			off = end
			continue
		}
		start := max(off, int64(e.off<<log))
		return diskfs.Extent{
			Offset: start,
			Length: end - start,
			Device: i.fs.extentOffset(e) + start - int64(e.off<<log),
		}, nil
	}
	return diskfs.Extent{}, io.EOF
}

package ntfs

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// $LogFile begins with two restart pages: "RSTR", the update sequence (2+2), a log
// number (8), size of a page (4), of a log page (4), place of the restart area (2). The area:
// current log number (8), clients (2), first free client (2), first client in use (2,
// 0xffff for none), flags (2). A log that was emptied holds only 0xff.
const (
	noClient = 0xffff
	logClean = 0x2
	// logPages covers both restart pages, of up to 64 KiB.
	logPages = 128 << 10
)

// checkLog reports whether the journal has changes that are not in the volume.
func (f *FS) checkLog(stale bool) error {
	clean, err := f.logIsClean()
	switch {
	case err == nil && clean:
		f.log = diskfs.LogClean
		return nil
	case stale:
		f.log = diskfs.LogIgnored
		return nil
	case err == nil:
		err = unsupported("replay of $LogFile")
	case !errors.Is(err, diskfs.ErrCorrupt):
		return err
	}
	return diskfs.DirtyLogError(err)
}

func (f *FS) logIsClean() (bool, error) {
	rec, err := f.file(inoLog)
	if err != nil {
		return false, err
	}
	s, err := rec.stream(f, attrData, "")
	if err != nil {
		return false, err
	}
	b := make([]byte, min(logPages, s.size))
	if err := s.read(b, 0); err != nil {
		return false, err
	}
	if len(bytes.Trim(b, "\xff")) == 0 {
		return true, nil
	}
	var newest uint64
	var clean, found bool
	for at := 0; at+fixupStride <= len(b); {
		page := b[at:]
		if string(page[:4]) != "RSTR" {
			if at > 0 {
				break
			}
			at = 4096 // the first page may be torn where the second stands
			continue
		}
		size := le.Uint32(page[16:])
		if size < fixupStride || size > logPages/2 || size&(size-1) != 0 || int(size) > len(page) {
			return false, corrupt("$LogFile", "restart page of %d bytes", size)
		}
		page = page[:size]
		if err := fixup(page, fmt.Sprintf("$LogFile page at %d", at)); err == nil {
			area := int(le.Uint16(page[24:]))
			if area+16 > len(page) {
				return false, corrupt("$LogFile", "restart area at %d", area)
			}
			lsn := le.Uint64(page[area:])
			if !found || lsn > newest {
				newest, found = lsn, true
				clean = le.Uint16(page[area+12:]) == noClient || le.Uint16(page[area+14:])&logClean != 0
			}
		}
		if at > 0 {
			break
		}
		at = int(size)
	}
	if !found {
		return false, corrupt("$LogFile", "it has no restart page")
	}
	return clean, nil
}

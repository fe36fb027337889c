package diskfs

import "github.com/varve-io/varve/internal/bytesize"

const (
	// MaxXattrs bounds the bytes of one inode's extended attributes. Linux lists at most 64 KiB
	// of names, and a value has at most as many.
	MaxXattrs = 64 << 20
	// XattrCost is what each counts besides its name and value.
	XattrCost = 128
)

// XattrTotal adds up the extended attributes of an inode. It is for the readers of formats:
// a small hostile image can have one long value stand for thousands.
type XattrTotal struct{ bytes int64 }

// Add counts an attribute. An error, of an inode of a format such as "ntfs", means that there are
// too many to read on.
func (t *XattrTotal) Add(format, inode, name string, size int64) error {
	if t.bytes += XattrCost + int64(len(name)) + size; t.bytes > MaxXattrs {
		return &CorruptError{Type: format, Where: inode, What: "more than " + bytesize.Format(MaxXattrs) + " of attributes"}
	}
	return nil
}

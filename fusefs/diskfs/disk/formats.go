package disk

import (
	"io"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/ext4"
	"github.com/varve-io/varve/fusefs/diskfs/fat"
	"github.com/varve-io/varve/fusefs/diskfs/ntfs"
	"github.com/varve-io/varve/fusefs/diskfs/xfs"
)

// opener opens a format's reader.
type opener func(r io.ReaderAt, size int64, opt diskfs.Options) (diskfs.Inodes, error)

// formats are the readers, by what Probe calls the volume.
var formats = map[string]opener{
	"ext2": format(ext4.Open),
	"ext3": format(ext4.Open),
	"ext4": format(ext4.Open),
	"ntfs": format(ntfs.Open),
	"vfat": format(fat.Open),
	"xfs":  format(xfs.Open),
}

// format makes an opener of a reader's Open. It must not pass on what comes with an
// error: a nil pointer in an interface is not nil.
func format[F diskfs.Inodes](open func(io.ReaderAt, int64, diskfs.Options) (F, error)) opener {
	return func(r io.ReaderAt, size int64, opt diskfs.Options) (diskfs.Inodes, error) {
		f, err := open(r, size, opt)
		if err != nil {
			return nil, err
		}
		return f, nil
	}
}

// containers are contents that are no file systems: mounting does not help.
var containers = map[string]string{
	"LVM2_member":       "a physical volume of LVM (its logical volumes are listed beside it)",
	"crypto_LUKS":       "an encrypted volume (LUKS); restore the disk and unlock it there",
	"BitLocker":         "an encrypted volume (BitLocker); restore the disk and unlock it there",
	"linux_raid_member": "a member of a RAID array; restore all its disks and assemble them",
	"zfs_member":        "a member of a ZFS pool; restore the disk and import the pool there",
	"swap":              "swap space, which holds no files",
	"swsuspend":         "a suspended system's memory, which holds no files",
	"jbd":               "an external journal, which holds no files",
	"ceph_bluestore":    "an object store of Ceph; restore the disk and start the OSD there",
	"vdo":               "a VDO volume; restore the disk and activate it there",
}

// unreadable says why a known content cannot be opened.
func unreadable(typ string) error {
	if what, ok := containers[typ]; ok {
		return &ContentError{Type: typ, What: what}
	}
	return &diskfs.UnsupportedError{Type: typ, Feature: "reading this file system without a mount"}
}

// ContentError says that a volume holds no file system. It matches diskfs.ErrUnsupported.
type ContentError struct {
	Type string // as Volume.Type
	What string
}

func (e *ContentError) Error() string { return "this volume is " + e.What + " (" + e.Type + ")" }

// Is makes errors.Is(err, diskfs.ErrUnsupported) true.
func (e *ContentError) Is(target error) bool { return target == diskfs.ErrUnsupported }

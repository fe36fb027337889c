package volumes

import (
	"fmt"
	"io"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/ext4"
	"github.com/varve-io/varve/fusefs/diskfs/fat"
	"github.com/varve-io/varve/fusefs/diskfs/ntfs"
	"github.com/varve-io/varve/fusefs/diskfs/xfs"
	"github.com/varve-io/varve/internal/probe"
)

// opener opens a format's reader.
type opener func(r io.ReaderAt, size int64, opt diskfs.Options) (diskfs.Inodes, error)

// formats are the readers, by what probe calls the volume.
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
	"LVM2_member":               "a physical volume of LVM (its logical volumes are listed beside it)",
	"LVM1_member":               "a physical volume of LVM 1, which Linux no longer reads; restore the disk to a system that does",
	"crypto_LUKS":               "an encrypted volume (LUKS); restore the disk and unlock it there",
	"BitLocker":                 "an encrypted volume (BitLocker); restore the disk and unlock it there",
	"cs_fvault2":                "an encrypted volume (FileVault); restore the disk and unlock it there",
	"ldm_member":                "part of a dynamic disk of Windows or of a storage pool; restore all disks of it and read them with Windows",
	"linux_raid_member":         "a member of a RAID array; restore all its disks and assemble them",
	"ddf_raid_member":           "a member of a RAID array (DDF); restore all its disks and assemble them ('mdadm --assemble --scan')",
	"isw_raid_member":           "a member of a RAID array (Intel firmware RAID); restore all its disks and assemble them ('mdadm --assemble --scan')",
	"zfs_member":                "a member of a ZFS pool; restore the pool's disks and import the pool there",
	"drbd":                      "the device of a DRBD resource; restore the disk and bring the resource up there",
	"bcache":                    "a device of a bcache set, whose newest data may be on the cache device; restore all its devices and register them",
	"stratis":                   "a device of a Stratis pool; restore all its devices and start the pool there",
	"ubi":                       "flash memory of UBI; restore it to flash memory and attach it there",
	"VMFS_volume_member":        "a datastore of VMware; restore the disk and attach it to a host there",
	"DM_snapshot_cow":           "the exception store of a snapshot; restore it together with the snapshot's origin",
	"DM_verity_hash":            "a tree of dm-verity hashes, which holds no files",
	"DM_integrity":              "a dm-integrity device; restore the disk and open it there ('integritysetup open')",
	"swap":                      "swap space, which holds no files",
	"swsuspend":                 "a suspended system's memory, which holds no files",
	"jbd":                       "an external journal, which holds no files",
	"xfs_external_log":          "an external log of XFS, which holds no files",
	"ceph_bluestore":            "an object store of Ceph; restore the disk and start the OSD there",
	"vdo":                       "a VDO volume; restore the disk and activate it there",
	"oracleasm":                 "a disk of Oracle ASM; restore the disk group's disks and mount the group there",
	"mpool":                     "a device of an mpool, which holds no files",
	"drbdmanage_control_volume": "a control volume of drbdmanage, which holds no files",
	"drbdproxy_datalog":         "a data log of DRBD Proxy, which holds no files",
}

// noDriver are file systems that the kernel has no driver for, so that a mount does not help.
var noDriver = map[string]string{
	"apfs": "read it with macOS", "ReFS": "read it with Windows", "VMFS": "attach it to a VMware host",
	"nss": "read it with Open Enterprise Server", "exfs": "read it with the software that made it",
	"gfs": "read it with a system that knows GFS", "ocfs": "read it with a system that knows OCFS",
	"reiser4": "read it with a kernel that has Reiser4", "xenix": "read it with a system that knows it",
	"scoutfs_meta": "read it with a kernel that has ScoutFS", "scoutfs_data": "read it with a kernel that has ScoutFS",
	"squashfs3": "unpack it with unsquashfs", "ubifs": "restore it to flash memory",
	"zonefs": "restore it to a zoned device",
}

// unreadable says why a known content cannot be opened, and what to do about it.
func unreadable(s *probe.Signature) error {
	if s.Array != nil && s.Type != "btrfs" {
		return arrayError(s)
	}
	if _, ok := containers[s.Type]; ok {
		return containerError(s.Type)
	}
	err := &diskfs.UnsupportedError{Type: s.Type, Feature: "reading this file system without a mount"}
	if how, ok := noDriver[s.Type]; ok {
		err.Feature = "reading this file system"
		err.Advice = "Linux has no driver for it: restore the disk, or attach it ('varve attach'), and " + how
	}
	if s.Array != nil && s.Array.Devices > 1 {
		err.Feature = fmt.Sprintf("a file system on %d devices", s.Array.Devices)
		err.Advice = "restore all of them and mount it there"
	}
	return err
}

func containerError(typ string) error { return &ContentError{Type: typ, What: containers[typ]} }

// arrayError names the array that the volume is a member of.
func arrayError(s *probe.Signature) error {
	what, ok := containers[s.Type]
	if !ok {
		what = "a member of a RAID array (" + s.Array.Level + "); restore all its disks to a machine with such a controller, or assemble them with dmraid"
	}
	switch a := s.Array; {
	case a.Unusable != "" && (a.Level == "raid1" || a.Level == "mirror"):
		what = fmt.Sprintf("a member of a RAID array (%s), and %s; restore the array's other disks and assemble them", a.Describe(), a.Unusable)
	case s.Type == "linux_raid_member":
		what = fmt.Sprintf("a member of a RAID array (%s); restore all its disks and assemble them ('mdadm --assemble --scan')", a.Describe())
	}
	return &ContentError{Type: s.Type, What: what}
}

// ContentError says that a volume holds no file system. It matches diskfs.ErrUnsupported.
type ContentError struct {
	Type string // as Volume.Type
	What string
}

func (e *ContentError) Error() string { return "this volume is " + e.What + " (" + e.Type + ")" }

// Is makes errors.Is(err, diskfs.ErrUnsupported) true.
func (e *ContentError) Is(target error) bool { return target == diskfs.ErrUnsupported }

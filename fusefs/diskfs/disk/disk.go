// Package disk opens what a disk image holds: it finds partitions and LVM2 logical
// volumes, names each volume's content, and opens the file systems that can be read
// without the kernel.
package disk

import (
	"errors"
	"fmt"
	"io"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/lvm"
)

// Disk is what an image holds.
type Disk struct {
	// Table is the partition table, nil if the image has none.
	Table *diskfs.Table
	// Volumes are the whole disk, or its partitions, and then the logical volumes in
	// these.
	Volumes []*Volume
}

// Volume is a range of bytes that may hold a file system. It may be opened
// concurrently.
type Volume struct {
	// Name is "" for the whole disk, "p1" for a partition by its number, "group/volume"
	// for a logical volume.
	Name string
	// Type is what the signature says ("ext4", "LVM2_member", …), empty if there is none that is known.
	Type string
	// Partition is the entry of the table, nil for others.
	Partition *diskfs.Partition
	Size      int64

	r     io.ReaderAt
	err   error // why the volume cannot be opened
	place func(off int64) (at, length int64)
}

// Open reads the partition table and the volumes' signatures. r must allow
// concurrent calls and is not closed. A damaged table is an error (diskfs.ErrCorrupt); damage
// within one volume shows when that volume is opened.
func Open(r io.ReaderAt, size int64) (*Disk, error) {
	table, err := diskfs.Partitions(r, size)
	d := &Disk{Table: table}
	switch {
	case errors.Is(err, diskfs.ErrNotRecognised):
		d.Volumes = []*Volume{newVolume("", r, size)}
	case err != nil:
		return nil, err
	default:
		for i := range table.Partitions {
			p := &table.Partitions[i]
			v := newVolume(fmt.Sprintf("p%d", p.Number), io.NewSectionReader(r, p.Start, p.Length), p.Length)
			v.Partition = p
			v.place = func(off int64) (at, length int64) { return p.Start + off, p.Length - off }
			d.Volumes = append(d.Volumes, v)
		}
	}
	d.addLogicalVolumes()
	return d, nil
}

func newVolume(name string, r io.ReaderAt, size int64) *Volume {
	v := &Volume{Name: name, Size: size, r: r}
	v.place = func(off int64) (at, length int64) { return off, size - off }
	v.Type, v.err = diskfs.Probe(r, size)
	return v
}

func (d *Disk) addLogicalVolumes() {
	var pvs []*lvm.PV
	under := map[*lvm.PV]*Volume{}
	for _, v := range d.Volumes {
		if v.Type != "LVM2_member" {
			continue
		}
		pv, err := lvm.ReadPV(v.r, v.Size)
		if err != nil {
			v.err = err
			continue
		}
		pvs = append(pvs, pv)
		under[pv] = v
	}
	for _, lv := range lvm.Volumes(pvs) {
		name := lv.Group + "/" + lv.Name
		if lv.Err != nil {
			d.Volumes = append(d.Volumes, &Volume{Name: name, Size: lv.Size, err: lv.Err})
			continue
		}
		v := newVolume(name, lv, lv.Size)
		v.place = func(off int64) (at, length int64) {
			pv, at, length := lv.Locate(off)
			if pv == nil {
				return 0, 0
			}
			at, _ = under[pv].place(at)
			return at, length
		}
		d.Volumes = append(d.Volumes, v)
	}
}

// ReadAt reads the volume's bytes as they are.
func (v *Volume) ReadAt(p []byte, off int64) (int, error) {
	if v.r == nil {
		return 0, v.err
	}
	return v.r.ReadAt(p, off)
}

// Locate tells where a byte of the volume lies on the disk, and how many bytes follow
// it there: none if that cannot be said.
func (v *Volume) Locate(off int64) (at, length int64) {
	if v.place == nil || off < 0 || off >= v.Size {
		return 0, 0
	}
	return v.place(off)
}

// Open opens the volume's file system. Errors: diskfs.ErrNotRecognised with what
// stands where signatures do; diskfs.ErrUnsupported naming what the volume holds
// or needs; diskfs.ErrCorrupt; diskfs.ErrDirtyLog.
func (v *Volume) Open(opt diskfs.Options) (diskfs.FileSystem, error) {
	if v.err != nil {
		return nil, v.err
	}
	open, ok := formats[v.Type]
	if !ok {
		return nil, unreadable(v.Type)
	}
	in, err := open(v.r, v.Size, opt)
	if err != nil {
		return nil, err
	}
	return diskfs.New(in), nil
}

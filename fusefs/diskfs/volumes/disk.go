// Package volumes opens what a disk image holds: it finds partitions, mirrors and LVM2 logical
// volumes, names each volume's content, and opens the file systems that can be read
// without the kernel.
package volumes

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/lvm"
	"github.com/varve-io/varve/internal/probe"
)

// Disk is what an image holds.
type Disk struct {
	// Table is the partition table, nil if the image has none.
	Table *probe.Table
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
	// For a member of a mirror it is what is on the mirror.
	Type string
	// Note is what a reader has to know of the content: that it is one side of a mirror.
	// Empty for most.
	Note string
	// Partition is the entry of the table, nil for others.
	Partition *probe.Partition
	Size      int64

	r     io.ReaderAt
	err   error // why the volume cannot be opened
	place placement
}

// Nothing says so where the disk has a partition table without any partition; nil otherwise.
func (d *Disk) Nothing() error {
	if d.Table == nil || len(d.Volumes) > 0 {
		return nil
	}
	return fmt.Errorf("%w: the disk has %s", diskfs.ErrNotRecognised, d.Table.Describe())
}

// placement maps a byte of a volume to the disk, with the number of bytes that follow it there.
type placement func(off int64) (at, length int64)

// maxMirrors bounds how deep mirrors may lie within each other.
const maxMirrors = 4

// Open reads the partition table and the volumes' signatures. r must allow
// concurrent calls and is not closed. A partition table that cannot be used at all is an
// error (diskfs.ErrCorrupt); damage within one volume, or in one entry of the table, shows
// when that volume is opened.
func Open(r io.ReaderAt, size int64) (*Disk, error) {
	d := &Disk{}
	outer := &Volume{r: r, Size: size, place: func(off int64) (at, length int64) { return off, size - off }}
	if err := d.open(outer, 0); err != nil {
		return nil, err
	}
	d.addLogicalVolumes()
	return d, nil
}

// open fills in what is on whole, which is the disk, or a mirror that it is one side of.
func (d *Disk) open(whole *Volume, depth int) error {
	c, err := probe.ReadContents(whole.r, whole.Size)
	var table *probe.TableError
	if errors.As(err, &table) {
		return &diskfs.CorruptError{Type: table.Scheme, Where: "partition table", What: table.What}
	}
	if err != nil {
		return err
	}
	if s := c.Signature; s != nil && s.Array != nil && s.Array.Mirror && depth < maxMirrors {
		return d.open(whole.side(s), depth+1)
	}
	switch {
	case c.Table == nil:
		whole.recognise(c.Signature)
	case c.Table.Foreign:
		whole.Type, whole.err = c.Table.Scheme, &ContentError{Type: c.Table.Scheme, What: "a disk with " + c.Table.Describe() + ", whose partitions Varve does not read"}
	default:
		d.addPartitions(whole, c)
		return nil
	}
	d.Volumes = []*Volume{whole}
	return nil
}

func (d *Disk) addPartitions(whole *Volume, c *probe.Contents) {
	d.Table = c.Table
	for i := range c.Table.Partitions {
		p := &c.Table.Partitions[i]
		v := whole.part(p.Start, p.Length)
		v.Name, v.Partition = fmt.Sprintf("p%d", p.Number), p
		if p.Dynamic() {
			v.Type, v.err = "ldm_member", containerError("ldm_member")
		} else {
			v.recognise(c.Volumes[i])
		}
		d.Volumes = append(d.Volumes, v)
	}
	for _, bad := range c.Table.Bad {
		d.Volumes = append(d.Volumes, &Volume{
			Name: fmt.Sprintf("p%d", bad.Number),
			err: &diskfs.CorruptError{
				Type: c.Table.Scheme, Where: fmt.Sprintf("partition %d", bad.Number),
				What: bad.What + "; the other partitions can be read",
			},
		})
	}
}

// part is a range of the volume as one of its own.
func (v *Volume) part(start, length int64) *Volume {
	place := v.place
	return &Volume{
		Note: v.Note, Size: length, r: io.NewSectionReader(v.r, start, length),
		place: func(off int64) (at, n int64) {
			at, n = place(start + off)
			return at, min(n, length-off)
		},
	}
}

// side is the content of a mirror that the volume is a member of.
func (v *Volume) side(s *probe.Signature) *Volume {
	inner := v.part(s.Array.DataOffset, s.Array.DataSize)
	inner.Name, inner.Partition = v.Name, v.Partition
	inner.Note = fmt.Sprintf("one member of a %s (%s): another member may hold newer data", s.Array.Describe(), s.Type)
	if !s.Array.Updated.IsZero() {
		inner.Note += ", this one was last current at " + s.Array.Updated.Format(time.RFC3339)
	}
	return inner
}

// recognise notes what is on the volume, nil standing for nothing known. A member of a mirror
// becomes the content of the mirror.
func (v *Volume) recognise(s *probe.Signature) {
	for range maxMirrors {
		if s == nil || s.Array == nil || !s.Array.Mirror {
			break
		}
		*v = *v.side(s)
		var err error
		if s, err = probe.ProbeVolume(v.r, v.Size); err != nil {
			v.err = err
			return
		}
	}
	if s == nil {
		_, v.err = probe.ProbeVolume(v.r, v.Size) // says what stands there
		return
	}
	v.Type = s.Type
	if _, ok := formats[s.Type]; !ok {
		v.err = unreadable(s)
	}
}

func (d *Disk) addLogicalVolumes() {
	var pvs []*lvm.PV
	under := map[*lvm.PV]*Volume{}
	for _, v := range d.Volumes {
		if v.Type != "LVM2_member" || v.r == nil {
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
		v := &Volume{Name: lv.Group + "/" + lv.Name, Size: lv.Size, err: lv.Err}
		d.Volumes = append(d.Volumes, v)
		if lv.Err != nil {
			continue
		}
		v.r = lv
		v.place = func(off int64) (at, length int64) {
			pv, at, length := lv.Locate(off)
			if pv == nil {
				return 0, 0
			}
			at, n := under[pv].place(at)
			return at, min(n, length)
		}
		for _, pv := range lv.On() {
			if note := under[pv].Note; note != "" {
				v.Note = note
			}
		}
		s, err := probe.ProbeVolume(lv, lv.Size)
		if err != nil {
			v.err = err
			continue
		}
		v.recognise(s)
	}
}

// ReadAt reads the volume's bytes as they are.
func (v *Volume) ReadAt(p []byte, off int64) (int, error) {
	if v.r == nil {
		return 0, v.err
	}
	return v.r.ReadAt(p, off)
}

// Locate returns where a byte of the volume lies on the disk, and how many bytes follow
// it there: none if that cannot be said.
func (v *Volume) Locate(off int64) (at, length int64) {
	if v.place == nil || off < 0 || off >= v.Size {
		return 0, 0
	}
	return v.place(off)
}

// Unmountable says why the kernel cannot mount the volume either: it holds no file system, or one
// without a driver, or lies outside of the disk. nil means that it may.
func (v *Volume) Unmountable() error {
	var (
		content     *ContentError
		unsupported *diskfs.UnsupportedError
		corrupt     *diskfs.CorruptError
	)
	if errors.As(v.err, &content) || errors.As(v.err, &corrupt) || errors.As(v.err, &unsupported) && unsupported.Advice != "" {
		return v.err
	}
	return nil
}

// Open opens the volume's file system. Errors: diskfs.ErrNotRecognised with what
// stands where signatures do; diskfs.ErrUnsupported naming what the volume holds
// or needs; diskfs.ErrCorrupt; diskfs.ErrDirtyLog.
func (v *Volume) Open(opt diskfs.Options) (diskfs.FileSystem, error) {
	if v.err != nil {
		return nil, v.err
	}
	in, err := formats[v.Type](v.r, v.Size, opt)
	if err != nil {
		return nil, err
	}
	return diskfs.New(in), nil
}

// Package lvm finds the logical volumes of LVM2 on the physical volumes inside a
// disk image, and reads linear ones: in user space, read-only, without device
// mapper.
//
// A physical volume ([ReadPV]) carries the whole group's metadata; [Volumes] puts the
// logical volumes together from all physical volumes of the image. Volumes of other kinds
// (striped, mirrored, thin, cached, snapshots) are listed, and say by name why
// they cannot be read; so are volumes that need a disk that is not there.
package lvm

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"

	"github.com/varve-io/varve/fusefs/diskfs"
)

const (
	sectorSize = 512
	// maxSegments bounds the pieces of one volume.
	maxSegments = 1 << 16
)

// Volume is a logical volume.
type Volume struct {
	Group string
	Name  string
	UUID  string // in LVM's own form
	Size  int64  // bytes
	// Err says why the volume cannot be read; nil if it can.
	Err error

	segments []segment
}

// segment is a piece of a volume that lies in one piece on a physical volume.
type segment struct {
	start, length int64 // bytes of the volume
	pv            *PV
	offset        int64 // bytes of the physical volume
}

// Volumes lists the visible logical volumes of the groups that pvs belong to, by
// name. Where physical volumes disagree, the latest metadata (seqno) counts.
func Volumes(pvs []*PV) []*Volume {
	latest := map[string]*PV{}
	byID := map[string]*PV{}
	for _, pv := range pvs {
		byID[pv.UUID] = pv
		if have := latest[pv.groupID]; pv.group != nil && (have == nil || have.group.number("seqno") < pv.group.number("seqno")) {
			latest[pv.groupID] = pv
		}
	}
	var list []*Volume
	for _, pv := range latest {
		list = append(list, groupVolumes(pv, byID)...)
	}
	sort.Slice(list, func(i, j int) bool {
		return list[i].Group+"/"+list[i].Name < list[j].Group+"/"+list[j].Name
	})
	return list
}

func groupVolumes(pv *PV, byID map[string]*PV) []*Volume {
	var list []*Volume
	snapshots, merging := snapshotsOf(pv.group)
	for name, v := range pv.group.section("logical_volumes") {
		lv, ok := v.(section)
		if !ok || lv.section("segment1").text("type") == "snapshot" || !slices.Contains(lv.list("status"), any("VISIBLE")) || !diskfs.ValidName(name) {
			continue
		}
		vol := &Volume{Group: pv.GroupName, Name: name, UUID: lv.text("id")}
		vol.Err = vol.assemble(lv, pv.group, byID)
		if origin, ok := snapshots[name]; ok {
			vol.Err = vol.unsupported("a snapshot of " + origin)
		} else if snapshot, ok := merging[name]; ok {
			vol.Err = vol.unsupported("which the snapshot " + snapshot + " is being merged into")
		}
		list = append(list, vol)
	}
	return list
}

// snapshotsOf finds the snapshots of the old kind. Each has a volume for its exceptions (chunks of
// both states, by no order of the volume), which metadata shows as a plain one with the
// snapshot's name, and a segment of type "snapshot" that says of what. The origin of one that is
// being merged is in between both states.
func snapshotsOf(group section) (origins, merging map[string]string) {
	origins, merging = map[string]string{}, map[string]string{}
	for _, v := range group.section("logical_volumes") {
		lv, ok := v.(section)
		if !ok {
			continue
		}
		seg := lv.section("segment1")
		if seg.text("type") != "snapshot" {
			continue
		}
		if store := seg.text("cow_store"); store != "" {
			origins[store] = seg.text("origin")
		}
		if store := seg.text("merging_store"); store != "" {
			origins[store] = seg.text("origin")
			merging[seg.text("origin")] = store
		}
	}
	return origins, merging
}

// unsupported names a layout that cannot be read without the device mapper.
func (v *Volume) unsupported(what string) error {
	return &diskfs.UnsupportedError{
		Type: "lvm2", Feature: fmt.Sprintf("logical volume %s/%s, %s,", v.Group, v.Name, what),
		Advice: "attach the disk ('varve attach') and activate the group ('vgchange -ay " + v.Group + "'), or restore it",
	}
}

// kinds are the types of segments in words.
var kinds = map[string]string{
	"mirror": "a mirror (type mirror)", "raid1": "a mirror (type raid1)", "thin": "a thin volume (type thin)",
	"thin-pool": "a pool of thin volumes (type thin-pool)", "cache": "a cached volume (type cache)", "cache-pool": "a cache (type cache-pool)",
	"writecache": "a cached volume (type writecache)", "vdo": "a VDO volume (type vdo)", "vdo-pool": "a VDO pool (type vdo-pool)",
	"error": "a volume whose disk is missing (type error)",
}

// kind says what a type of segment is.
func kind(typ string) string {
	if text, ok := kinds[typ]; ok {
		return text
	}
	if strings.HasPrefix(typ, "raid") {
		return "a RAID volume (type " + typ + ")"
	}
	return fmt.Sprintf("a volume of type %q", typ)
}

// assemble maps the volume's segments to physical volumes. Size is set also where
// the rest fails.
func (v *Volume) assemble(lv, group section, byID map[string]*PV) error {
	extent := group.number("extent_size")
	count := lv.number("segment_count")
	if extent <= 0 || extent > 1<<32 || count <= 0 || count > maxSegments {
		return v.corrupt("extents of %d sectors, %d segments", extent, count)
	}
	extent *= sectorSize
	var failed error
	for i := range count {
		seg := lv.section(fmt.Sprintf("segment%d", i+1))
		start, length := seg.number("start_extent"), seg.number("extent_count")
		if seg == nil || length <= 0 || length > (1<<62)/extent || start != v.Size/extent || v.Size > 1<<62-length*extent {
			return v.corrupt("segment %d of %d extents at extent %d", i+1, length, start)
		}
		s := segment{start: v.Size, length: length * extent}
		v.Size += s.length
		if err := v.place(&s, seg, extent, group, byID); err != nil && failed == nil {
			failed = err
		}
		v.segments = append(v.segments, s)
	}
	return failed
}

// place finds a linear segment on its physical volume.
func (v *Volume) place(s *segment, seg section, extent int64, group section, byID map[string]*PV) error {
	stripes := seg.list("stripes")
	switch typ := seg.text("type"); {
	case typ != "striped" && typ != "linear":
		return v.unsupported(kind(typ))
	case seg.number("stripe_count") > 1:
		return v.unsupported(fmt.Sprintf("a volume in %d stripes", seg.number("stripe_count")))
	case len(stripes) != 2:
		return v.corrupt("a linear segment with %d places", len(stripes)/2)
	}
	name, _ := stripes[0].(string)
	first, _ := stripes[1].(int64)
	described := group.section("physical_volumes").section(name)
	base := described.number("pe_start")
	if described == nil || first < 0 || base < 0 || first > (1<<62)/extent || base > 1<<52 {
		return v.corrupt("no place at extent %d of %q", first, name)
	}
	id := strings.ReplaceAll(described.text("id"), "-", "")
	pv := byID[id]
	if pv == nil {
		return fmt.Errorf("logical volume %s/%s needs the physical volume %s, which is not on this disk: back up both disks together, or restore and assemble them", v.Group, v.Name, described.text("id"))
	}
	s.pv, s.offset = pv, base*sectorSize+first*extent
	if s.offset < 0 || s.offset > pv.size || s.length > pv.size-s.offset {
		return v.corrupt("a segment of %d bytes at byte %d of a physical volume of %d", s.length, s.offset, pv.size)
	}
	return nil
}

func (v *Volume) corrupt(format string, args ...any) error {
	return &diskfs.CorruptError{Type: "lvm2", Where: "logical volume " + v.Group + "/" + v.Name, What: fmt.Sprintf(format, args...)}
}

// Locate returns where a byte of the volume lies on which physical volume, and how many bytes
// follow it there; nil if the volume cannot be read or ends before.
func (v *Volume) Locate(off int64) (pv *PV, at, length int64) {
	if v.Err != nil || off < 0 || off >= v.Size {
		return nil, 0, 0
	}
	s := v.segment(off)
	return s.pv, s.offset + off - s.start, s.start + s.length - off
}

// On lists the physical volumes that a readable volume lies on.
func (v *Volume) On() []*PV {
	var pvs []*PV
	for _, s := range v.segments {
		if s.pv != nil && !slices.Contains(pvs, s.pv) {
			pvs = append(pvs, s.pv)
		}
	}
	return pvs
}

// segment finds the one that a byte lies in.
func (v *Volume) segment(off int64) segment {
	return v.segments[sort.Search(len(v.segments), func(i int) bool { return v.segments[i].start+v.segments[i].length > off })]
}

// ReadAt reads the volume's bytes, as io.ReaderAt. It may be called concurrently.
func (v *Volume) ReadAt(p []byte, off int64) (int, error) {
	if v.Err != nil {
		return 0, v.Err
	}
	if off < 0 {
		return 0, errors.New("lvm: negative offset")
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if at >= v.Size {
			return done, io.EOF
		}
		s := v.segment(at)
		n := int(min(int64(len(p)-done), s.start+s.length-at))
		got, err := s.pv.r.ReadAt(p[done:done+n], s.offset+at-s.start)
		done += got
		if got < n {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return done, err
		}
	}
	return done, nil
}

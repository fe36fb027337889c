package lvm

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// layouts are logical volumes as lvm2 writes them into the metadata of a group. The device
// mapper of a test machine may not have their targets, so they are written by hand.
const layouts = `
vg {
id = "g"
seqno = 7
extent_size = 8
physical_volumes { pv0 { id = "p" pe_start = 2048 } }
logical_volumes {
	plain { id = "1" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 0] } }
	striped { id = "2" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 2 stripe_size = 128 stripes = ["pv0", 0, "pv0", 4] } }
	mirrored { id = "3" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "mirror" mirror_count = 2 mirror_log = "mirrored_mlog" mirrors = ["mirrored_mimage_0", 0, "mirrored_mimage_1", 0] } }
	mirrored_mimage_0 { id = "4" status = ["READ", "WRITE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 8] } }
	raided { id = "5" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "raid1" device_count = 2 raids = ["raided_rmeta_0", "raided_rimage_0", "raided_rmeta_1", "raided_rimage_1"] } }
	raided_rimage_0 { id = "6" status = ["READ", "WRITE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 12] } }
	five { id = "7" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "raid5_ls" device_count = 3 region_size = 1024 raids = ["a", "b"] } }
	pool { id = "8" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "thin-pool" metadata = "pool_tmeta" pool = "pool_tdata" transaction_id = 1 chunk_size = 128 } }
	thin { id = "9" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "thin" thin_pool = "pool" transaction_id = 0 device_id = 1 } }
	cached { id = "a" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "cache" cache_pool = "c" origin = "cached_corig" } }
	snap { id = "b" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 1 type = "striped" stripe_count = 1 stripes = ["pv0", 20] } }
	snapshot0 { id = "c" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 2 type = "snapshot" chunk_size = 8 origin = "plain" cow_store = "snap" } }
	target { id = "d" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 1 type = "striped" stripe_count = 1 stripes = ["pv0", 24] } }
	old { id = "e" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 1 type = "striped" stripe_count = 1 stripes = ["pv0", 28] } }
	snapshot1 { id = "f" status = ["READ", "WRITE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 1 type = "snapshot" chunk_size = 8 origin = "target" merging_store = "old" } }
	mixed { id = "g" status = ["READ", "WRITE", "VISIBLE"] segment_count = 2
		segment1 { start_extent = 0 extent_count = 1 type = "striped" stripe_count = 1 stripes = ["pv0", 30] }
		segment2 { start_extent = 1 extent_count = 1 type = "raid1" device_count = 2 raids = ["x", "y"] } }
	gone { id = "h" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
		segment1 { start_extent = 0 extent_count = 1 type = "error" } }
}
}`

// TestLayouts names each layout that needs the device mapper, with what to do instead.
func TestLayouts(t *testing.T) {
	disk := make([]byte, 4<<20)
	pv := &PV{UUID: "p", r: bytes.NewReader(disk), size: int64(len(disk))}
	if err := pv.setGroup(layouts); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"plain": "", "striped": "2 stripes", "mirrored": "type mirror", "raided": "type raid1", "five": "type raid5_ls", "pool": "type thin-pool",
		"thin": "type thin", "cached": "type cache", "snap": "a snapshot of plain", "target": "snapshot old is being merged", "old": "a snapshot of target",
		"mixed": "type raid1", "gone": "disk is missing",
	}
	vols := Volumes([]*PV{pv})
	for _, v := range vols {
		text, ok := want[v.Name]
		if !ok {
			t.Errorf("%s is listed", v.Name)
			continue
		}
		delete(want, v.Name)
		if text == "" {
			if v.Err != nil {
				t.Errorf("%s: %v", v.Name, v.Err)
			}
			continue
		}
		if !errors.Is(v.Err, diskfs.ErrUnsupported) || !strings.Contains(v.Err.Error(), text) || !strings.Contains(v.Err.Error(), "vg/"+v.Name) ||
			!strings.Contains(v.Err.Error(), "vgchange -ay vg") || strings.Contains(v.Err.Error(), "--kernel") {
			t.Errorf("%s: %v; want %q", v.Name, v.Err, text)
		}
		if _, err := v.ReadAt(make([]byte, 512), 0); err == nil {
			t.Errorf("%s can be read", v.Name)
		}
	}
	if len(want) > 0 {
		t.Errorf("not listed: %s", fmt.Sprint(want))
	}
}

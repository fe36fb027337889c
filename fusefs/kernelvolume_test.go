package fusefs

import (
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/volumes"
	"github.com/varve-io/varve/internal/probe"
)

func TestKernelVolume(t *testing.T) {
	partition := &volumes.Volume{Name: "p1", Type: "ext4", Partition: &probe.Partition{Number: 1}}
	physical := &volumes.Volume{Name: "p2", Type: "LVM2_member", Partition: &probe.Partition{Number: 2}}
	logical := &volumes.Volume{Name: "vg/root", Type: "ext4"}
	partitioned := &volumes.Disk{Table: &probe.Table{}, Volumes: []*volumes.Volume{partition, physical, logical}}
	whole := &volumes.Volume{Type: "xfs"}
	for _, c := range []struct {
		name, volume string
		disk         *volumes.Disk
		want         *volumes.Volume
		err          string
	}{
		{"a partition", "p1", partitioned, partition, ""},
		{"a whole disk", "", &volumes.Disk{Volumes: []*volumes.Volume{whole}}, whole, ""},
		{"no name", "", partitioned, nil, "--partition"},
		{"a wrong name", "p7", partitioned, nil, "p1 (ext4)"},
		{"a partition of a whole disk", "p1", &volumes.Disk{Volumes: []*volumes.Volume{whole}}, nil, "leave out --partition"},
		{"a logical volume", "vg/root", partitioned, nil, "logical volume of LVM"},
		{"a physical volume", "p2", partitioned, nil, "physical volume of LVM"},
		{"a disk that is one", "", &volumes.Disk{Volumes: []*volumes.Volume{{Type: "LVM2_member"}, logical}}, nil, "the disk is a physical volume"},
	} {
		v, err := kernelVolume(c.disk, c.volume)
		if v != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %+v, %v; want the error to say %q", c.name, v, err, c.err)
		}
	}
}

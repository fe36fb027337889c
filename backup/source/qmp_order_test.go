package source

import (
	"strings"
	"testing"
)

// TestQMPOrder looks at the order of a transaction's actions: only blockdev-backup waits for the
// guest's writes in flight, whose bits are set once they have ended. A copy of a bitmap that is
// made before its disk's job, or between those of two disks, could lack such a write.
func TestQMPOrder(t *testing.T) {
	t.Parallel()
	m := &qmpMachine{target: "varve-o-new"}
	for _, name := range []string{"vda", "vdb", "vdc"} {
		s := &qmpSession{qmpDisk: qmpDisk{name, qmpNode{Name: "node-" + name}}, id: "varve-o-s-" + name}
		if name != "vdb" { // which has no base
			s.old = "varve-o-old"
			s.node.Bitmaps = []qmpBitmap{{Name: s.old, Granularity: 4096}}
		}
		m.disks = append(m.disks, s)
	}
	var got []string
	for _, a := range m.actions() {
		where := a.Data["node"]
		if where == nil {
			where = a.Data["device"]
		}
		got = append(got, strings.TrimPrefix(a.Type, "block-dirty-bitmap-")+" "+where.(string))
	}
	want := []string{
		"add node-vda", "add varve-o-s-vda", "add node-vdb", "add node-vdc", "add varve-o-s-vdc",
		"blockdev-backup node-vda", "blockdev-backup node-vdb", "blockdev-backup node-vdc",
		"merge varve-o-s-vda", "merge varve-o-s-vdc",
	}
	if strings.Join(got, ", ") != strings.Join(want, ", ") {
		t.Errorf("the actions are %q", got)
	}
}

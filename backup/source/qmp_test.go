package source_test

import (
	"testing"
)

// TestQMPConcurrentWrites backs up qcow2 and raw disks of one machine that writes all the time.
func TestQMPConcurrentWrites(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, threeDisks()...)
	for name := range d.guest {
		d.write(t, name, 1, 0, 4<<20)
	}
	was := d.read(t)
	first := machine{}.mustBackup(t, d, func() {
		for name := range d.guest {
			d.write(t, name, 2, 1<<20, 300_000)
			d.write(t, name, 2, 6<<20, 5)
		}
	})
	first.check(t, was, "allocation")
	d.mustBeClean(t, 1)
	d.write(t, "vda", 3, 3<<20, 100)
	d.write(t, "vdb", 0, 0, 1<<20)
	was = d.read(t)
	second := first.mustBackup(t, d, func() { d.write(t, "vda", 4, 0, machineSize) })
	second.check(t, was, "bitmap")
	d.mustBeClean(t, 1)
	was = d.read(t)
	second.mustBackup(t, d, nil).check(t, was, "bitmap")
}

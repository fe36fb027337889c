package source_test

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/source"
)

// TestQMPBitmaps has old bitmaps that must not be used, or that look different than the one
// that was made.
func TestQMPBitmaps(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil func(t *testing.T, d *daemon, bitmap string)
		by    string
		why   string
	}{
		"removed": {func(t *testing.T, d *daemon, b string) {
			d.do(t, "block-dirty-bitmap-remove", map[string]any{"node": "vda", "name": b})
			d.write(t, "vda", 9, 1<<20, 100)
		}, "allocation", "has no bitmap"},
		"disabled": {func(t *testing.T, d *daemon, b string) {
			d.do(t, "block-dirty-bitmap-disable", map[string]any{"node": "vda", "name": b})
			d.write(t, "vda", 9, 1<<20, 100)
		}, "allocation", "disabled"},
		"of another granularity": {func(t *testing.T, d *daemon, b string) {
			d.do(t, "block-dirty-bitmap-remove", map[string]any{"node": "vda", "name": b})
			d.do(t, "block-dirty-bitmap-add", map[string]any{"node": "vda", "name": b, "granularity": 512 << 10, "persistent": true})
			d.write(t, "vda", 9, 3<<20, 100)
		}, "bitmap", ""},
		"grown": {func(t *testing.T, d *daemon, _ string) {
			d.do(t, "block_resize", map[string]any{"node-name": "vda", "size": machineSize + 1<<20})
			d.write(t, "vda", 9, machineSize+512<<10, 100)
		}, "bitmap", ""},
		// Rule 1: no bit is set, and half of the disk is lost.
		"resized and resized back": {func(t *testing.T, d *daemon, _ string) {
			d.do(t, "block_resize", map[string]any{"node-name": "vda", "size": machineSize / 2})
			d.do(t, "block_resize", map[string]any{"node-name": "vda", "size": machineSize})
		}, "bitmap", ""},
		// Rule 2: the bitmap stays with the backing file, and misses what is written above it.
		"of the backing file": {func(t *testing.T, d *daemon, _ string) {
			top := filepath.Join(d.dir, "top.qcow2")
			tool(t, "qemu-img", "create", "-q", "-f", "qcow2", top, "8M")
			d.do(t, "blockdev-add", map[string]any{
				"driver": "qcow2", "node-name": "top", "backing": nil, "file": map[string]any{"driver": "file", "filename": top},
			})
			d.do(t, "blockdev-snapshot", map[string]any{"node": "vda", "overlay": "top"})
			d.write(t, "vda", 9, 1<<20, 100)
		}, "allocation", "top image has no bitmap"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t, diskOf{name: "vda", format: "qcow2"})
			d.write(t, "vda", 1, 0, machineSize)
			first := machine{}.mustBackup(t, d, nil)
			c.spoil(t, d, first["vda"].id)
			// After a snapshot the disk has another name in a daemon, which has no devices.
			disk := "vda"
			if name == "of the backing file" {
				disk = "top"
				first["top"] = first["vda"]
			}
			want := d.read(t)
			now := first.mustBackup(t, d, func() { d.write(t, "vda", 8, 0, 1<<20) })
			now.check(t, map[string][]byte{disk: want["vda"]}, c.by)
			if why := now[disk].why; c.why != "" && (len(why) != 1 || !strings.Contains(why[0].Error(), c.why)) {
				t.Errorf("why not by the bitmap: %v", why)
			}
		})
	}
}

// TestQMPRawDataFile has a disk whose bytes are in a raw data file: QEMU reserves room there when it
// grows, and calls none of it zero.
func TestQMPRawDataFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "vm.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data")+",data_file_raw=on", path, "8M")
	d := startDaemon(t, diskOf{name: "vda", format: "qcow2", path: path})
	d.write(t, "vda", 1, 0, machineSize)
	first := machine{}.mustBackup(t, d, nil)
	d.do(t, "block_resize", map[string]any{"node-name": "vda", "size": machineSize / 2})
	d.do(t, "block_resize", map[string]any{"node-name": "vda", "size": machineSize})
	now := first.mustBackup(t, d, nil)
	now.check(t, d.read(t), "allocation")
	if why := now["vda"].why; len(why) != 1 || !strings.Contains(why[0].Error(), "raw data file") {
		t.Errorf("why not by the bitmap: %v", why)
	}
}

// TestQMPBusy has a bitmap that another tool uses.
func TestQMPBusy(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, diskOf{name: "vda", format: "qcow2"})
	d.write(t, "vda", 1, 0, 4<<20)
	first := machine{}.mustBackup(t, d, nil)
	d.write(t, "vda", 9, 1<<20, 4<<20)
	want := d.read(t)
	// QEMU exports no bitmap that records, and nothing beside a guest that could resize the disk.
	d.do(t, "block-dirty-bitmap-disable", map[string]any{"node": "vda", "name": first["vda"].id})
	d.do(t, "block-export-del", map[string]any{"id": "guest-vda", "mode": "hard"})
	for string(d.do(t, "query-block-exports", nil)) != "[]" {
		time.Sleep(5 * time.Millisecond)
	}
	socket := filepath.Join(d.dir, "n")
	d.do(t, "nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": socket}}})
	d.do(t, "block-export-add", map[string]any{
		"type": "nbd", "id": "others", "node-name": "vda", "bitmaps": []map[string]any{{"node": "vda", "name": first["vda"].id}},
	})
	now, err := first.backup(t.Context(), d.uri()+"?nbd=nbd%2Bunix:///%3Fsocket%3D"+socket, first.options(t.TempDir()), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	now.check(t, want, "allocation")
	if why := now["vda"].why; len(why) != 1 || !strings.Contains(why[0].Error(), "in use") {
		t.Errorf("why not by the bitmap: %v", why)
	}
}

// TestQMPInconsistent has a QEMU that died: its bitmap is inconsistent for ever. The image
// itself is backed up by the same bitmaps while no QEMU has it.
func TestQMPInconsistent(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "vda.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
	disk := diskOf{name: "vda", format: "qcow2", path: path}
	var first machine
	t.Run("running", func(t *testing.T) {
		d := startDaemon(t, disk)
		d.write(t, "vda", 1, 0, 4<<20)
		first = machine{}.mustBackup(t, d, nil)
		d.write(t, "vda", 2, 1<<20, 100)
	})
	opt := source.Options{Owner: first.options("").Owner}
	stopped := take(t, path, opt, first["vda"])
	if stopped.by != "bitmap" || stopped.bytes[1<<20] != 2 {
		t.Errorf("the image of the stopped machine is by %s (%v), or its bytes are others", stopped.by, stopped.why)
	}
	cmd := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 9 2M 64k", "-c", "abort", path)
	if err := cmd.Run(); err == nil {
		t.Error("the writer was not killed")
	}
	t.Run("again", func(t *testing.T) {
		d := startDaemon(t, disk)
		want := d.read(t)
		now := machine{"vda": stopped}.mustBackup(t, d, nil)
		now.check(t, want, "allocation")
		if why := now["vda"].why; len(why) != 1 || !strings.Contains(why[0].Error(), "inconsistent") {
			t.Errorf("why not by the bitmap: %v", why)
		}
		d.mustBeClean(t, 1)
		d.write(t, "vda", 3, 3<<20, 100)
		want = d.read(t)
		now.mustBackup(t, d, nil).check(t, want, "bitmap")
	})
}

// TestQMPInfoAndForget looks at a machine, and removes what tracks it.
func TestQMPInfoAndForget(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, threeDisks()...)
	for name := range d.guest {
		d.write(t, name, 1, 0, 1<<20)
	}
	first := machine{}.mustBackup(t, d, nil)
	d.write(t, "vda", 2, 0, 1<<16)
	opt := first.options("")
	opt.Inspect, opt.Exclude = true, []string{"vdc"}
	s, err := source.Open(t.Context(), d.uri(), opt)
	if err != nil {
		t.Fatal(err)
	}
	disks := s.Disks()
	if len(disks) != 2 || disks[0].Estimate.By != "bitmap" || disks[0].Estimate.Bytes != 1<<16 || disks[1].Estimate.Bytes != 0 ||
		disks[0].Bytes.Size() != machineSize || !strings.Contains(disks[1].Kind, "raw disk") {
		b, _ := json.Marshal(disks)
		t.Errorf("the disks are %s", b)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	d.mustBeClean(t, 1)
	removed, err := source.Forget(t.Context(), d.uri(), source.Options{Owner: "repo1234-another1"})
	if err != nil || len(removed) != 0 {
		t.Errorf("of another volume: %q, %v", removed, err)
	}
	// All of Varve's, also of a backup that was killed.
	if _, err := runKilled(t, d.uri(), t.TempDir(), "moment"); err == nil {
		t.Error("it was not killed")
	}
	removed, err = source.Forget(t.Context(), d.uri(), source.Options{})
	if err != nil || len(removed) != 3 {
		t.Errorf("forgot %q, %v", removed, err)
	}
	d.mustBeClean(t, 0)
}

package source_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/source"
)

// The two rules for bitmaps, and where each is tried with a disk that loses data without it:
//
//	                                 zeroes are changes                only the top image's bitmap counts
//	image files                      TestImageShrunkAndGrown           TestImageOverlay
//	QMP                              TestQMPBitmaps                    TestQMPBitmaps, TestQMPBitmapOfBackingLosesData
//	libvirt, running                 libvirtCheckpoints                libvirtCheckpoints, libvirtOverlay
//	libvirt, stopped                 by those of image files           libvirtOverlay
//	NBD exports                      TestBitmapShrunkAndGrown          the server's to keep (docs/vm.md)
//	oVirt                            TestShrunkAndGrown (imageio)      oVirt's to keep

// TestQMPBitmapOfBackingLosesData breaks the second rule, to prove that it is needed: to a backup
// that takes the bitmap of the backing image for the disk's own, what was written above it is clean.
func TestQMPBitmapOfBackingLosesData(t *testing.T) {
	t.Parallel()
	for name, broken := range map[string]bool{"kept": false, "broken": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t, diskOf{name: "vda", format: "qcow2"})
			d.write(t, "vda", 1, 0, machineSize)
			first := machine{}.mustBackup(t, d, nil)
			old := first["vda"].id
			top := filepath.Join(d.dir, "top.qcow2")
			tool(t, "qemu-img", "create", "-q", "-f", "qcow2", top, "8M")
			d.do(t, "blockdev-add", map[string]any{
				"driver": "qcow2", "node-name": "top", "backing": nil, "file": map[string]any{"driver": "file", "filename": top},
			})
			d.do(t, "blockdev-snapshot", map[string]any{"node": "vda", "overlay": "top"})
			d.write(t, "vda", 9, 1<<20, 100)
			want := d.read(t)["vda"]
			first["top"] = first["vda"]

			uri := d.uri()
			if broken {
				p := startProxy(t, proxy{target: d.monitor, read: readLine, ask: func(m []byte) (on, _ []byte) {
					// The copy is of the bitmap beneath.
					return bytes.ReplaceAll(m, []byte(`"name":"`+old+`","node":"top"`), []byte(`"name":"`+old+`","node":"vda"`)), nil
				}, tell: lieAboutBitmaps})
				uri = "qemu+qmp://" + p.socket
			}
			now, err := first.backup(t.Context(), uri, first.options(t.TempDir()), nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			got := now["top"]
			switch {
			case !broken && (got.by != "allocation" || !bytes.Equal(got.bytes, want)):
				t.Errorf("by %s (%v), or other bytes", got.by, got.why)
			case broken && got.by != "bitmap":
				t.Errorf("the rule was not broken: by %s (%v)", got.by, got.why)
			case broken && bytes.Equal(got.bytes, want):
				t.Error("the rule was broken, and nothing is lost: this test proves nothing")
			}
		})
	}
}

// lieAboutBitmaps has the node "top" list the bitmaps of "vda", as one that looks through the whole
// chain would see them.
func lieAboutBitmaps(m []byte) []byte {
	if !bytes.Contains(m, []byte(`"dirty-bitmaps"`)) {
		return m
	}
	return rewrite(m, func(o map[string]any) {
		nodes, _ := o["return"].([]any)
		var bitmaps any
		for _, n := range nodes {
			if n := n.(map[string]any); n["node-name"] == "vda" {
				bitmaps = n["dirty-bitmaps"]
			}
		}
		for _, n := range nodes {
			if n := n.(map[string]any); n["node-name"] == "top" && n["dirty-bitmaps"] == nil {
				n["dirty-bitmaps"] = bitmaps
			}
		}
	})
}

// libvirtOverlay puts an image above a disk without libvirt's knowledge, stopped and running: the
// checkpoint's bitmap stays beneath, and misses what is written from then on.
func libvirtOverlay(t *testing.T, d *domain) {
	d.start(t)
	d.write(t, "vda", 1, 0, 4<<20)
	now := d.mustBackup(t, machine{}, nil)
	d.stop(t)
	base := filepath.Join(d.dir, "beneath.qcow2")
	if err := os.Rename(d.path("vda"), base); err != nil {
		t.Fatal(err)
	}
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", d.path("vda"))
	write(t, d.path("vda"), "write -P 2 1M 64k")
	copy(d.model["vda"][1<<20:], bytes.Repeat([]byte{2}, 64<<10))
	stopped := d.mustBackup(t, now, nil)
	stopped.check(t, map[string][]byte{"vda": d.model["vda"]}, "allocation")
	stopped.check(t, map[string][]byte{"vdc": d.model["vdc"]}, "bitmap")

	// Another one, found running: libvirt knows of the checkpoint, whose bitmap is beneath.
	second := filepath.Join(d.dir, "second.qcow2")
	if err := os.Rename(d.path("vda"), second); err != nil {
		t.Fatal(err)
	}
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", second, "-F", "qcow2", d.path("vda"))
	d.start(t)
	d.write(t, "vda", 3, 2<<20, 64<<10)
	want := d.read()
	running := d.mustBackup(t, stopped, nil)
	running.check(t, map[string][]byte{"vda": want["vda"]}, "allocation")
	d.mustBeClean(t, 1)
	d.write(t, "vda", 4, 3<<20, 64<<10)
	want = d.read()
	d.check(t, d.mustBackup(t, running, nil), want, "bitmap")
}

// libvirtHangs has a libvirt that does not answer a call: the backup ends, the guest goes on, and the
// next backup is right.
func libvirtHangs(t *testing.T, d *domain) {
	d.start(t)
	d.write(t, "vda", 1, 0, 4<<20)
	now := d.mustBackup(t, machine{}, nil)

	// What the guest's agent would do is answered here: this guest has none.
	var calls []uint32
	hang := uint32(procBackupBegin)
	froze, hung := 0, 0
	p := startProxy(t, proxy{target: d.socket, read: readPacket, ask: func(m []byte) (on, answer []byte) {
		proc := procedureOf(m)
		d.mu.Lock()
		defer d.mu.Unlock()
		calls = append(calls, proc)
		if proc == hang && hung == 0 && (proc != procFsthaw || froze > 0) {
			hung++
			return nil, nil
		}
		switch proc {
		case procFsfreeze:
			froze++
			return nil, answerTo(m, 1)
		case procFsthaw:
			froze = 0
			return nil, answerTo(m, 1)
		}
		return m, nil
	}})
	uri := "libvirt:///" + d.name + "?timeout=10&socket=" + p.socket
	for _, c := range []struct {
		name string
		proc uint32
		call string // in the error; empty for none
	}{
		{"the beginning of the job", procBackupBegin, "DomainBackupBegin"},
		{"the look at the job", procBackupXML, "DomainBackupGetXMLDesc"},
		{"the thaw", procFsthaw, ""},
		{"the freeze", procFsfreeze, "DomainFsfreeze"},
	} {
		d.mu.Lock()
		hang, hung, calls = c.proc, 0, nil
		d.mu.Unlock()
		opt := now.options(t.TempDir())
		opt.Freeze, opt.Self = true, []string{os.Args[0], "guest-freeze"}
		s, err := now.backup(t.Context(), uri, opt, nil, nil)
		switch {
		case c.call == "" && err != nil:
			t.Errorf("%s was not answered once: %v", c.name, err)
		case c.call == "":
			d.check(t, s, d.read(), "bitmap")
			now = s
		case err == nil || !strings.Contains(err.Error(), c.call):
			t.Errorf("%s was not answered, and the error does not say so: %v", c.name, err)
		}
		d.mu.Lock()
		if froze != 0 || hung == 0 {
			t.Errorf("%s: the guest is frozen %d times, %d calls hung: %d", c.name, froze, hung, calls)
		}
		hang = 0
		d.mu.Unlock()
		d.write(t, "vda", 7, 5<<20, 4096)
		want := d.read()
		now = d.mustBackup(t, now, nil)
		d.check(t, now, want, "bitmap")
		d.mustBeClean(t, 1)
	}
	// The same of looking and forgetting.
	d.mu.Lock()
	hang, hung = procBackupXML, 0
	d.mu.Unlock()
	if _, err := source.Forget(t.Context(), uri, source.Options{}); err == nil || !strings.Contains(err.Error(), "DomainBackupGetXMLDesc") {
		t.Errorf("forgetting: %v", err)
	}
	d.mustBeClean(t, 1)
}

// top finds the root node of a disk in what QEMU says, whatever was put above it.
func (d *domain) top(t *testing.T, disk string) string {
	t.Helper()
	var answer struct {
		Return []struct {
			QDev     string `json:"qdev"`
			Inserted struct {
				Node string `json:"node-name"`
			} `json:"inserted"`
		} `json:"return"`
	}
	if err := json.Unmarshal([]byte(d.virsh(t, "qemu-monitor-command", d.name, `{"execute":"query-block"}`)), &answer); err != nil {
		t.Fatal(err)
	}
	for _, b := range answer.Return {
		if strings.Contains(b.QDev, alias(disk)) {
			return b.Inserted.Node
		}
	}
	t.Fatalf("QEMU has no %s: %+v", disk, answer)
	return ""
}

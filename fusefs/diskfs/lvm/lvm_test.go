//go:build linux

package lvm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// groupImages makes a volume group over two images, with the tools of LVM and without
// device mapper. The report says where LVM has put the segments: volume, byte of
// the volume, number of the image and of the extent on it.
func groupImages(t testing.TB) (images [2]string, report string) {
	t.Helper()
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "lvm")
	var loops [2]string
	for i := range images {
		images[i] = diskfstest.NewImage(t, 64<<20)
		loops[i] = strings.TrimSpace(diskfstest.Run(t, "losetup", "--find", "--show", images[i]))
		defer diskfstest.Run(t, "losetup", "--detach", loops[i])
	}
	run := func(args ...string) string {
		t.Helper()
		config := `devices { scan="/dev" use_devicesfile=0 filter=["a|` + loops[0] + `$|","a|` + loops[1] + `$|","r|.*|"] } global { locking_type=1 } activation { udev_sync=0 udev_rules=0 } backup { backup=0 archive=0 }`
		return diskfstest.Run(t, "lvm", append(args, "--config", config, "--driverloaded", "n")...)
	}
	run("pvcreate", "-q", loops[0])
	run("pvcreate", "-q", loops[1])
	run("vgcreate", "-q", "-s", "1m", "vg", loops[0], loops[1])
	run("lvcreate", "-an", "-Zn", "-Wn", "-n", "small", "-L", "8m", "vg")
	run("lvcreate", "-an", "-Zn", "-Wn", "-n", "between", "-L", "4m", "vg")
	run("lvextend", "vg/small", "-L", "16m")                                           // two segments
	run("lvcreate", "-an", "-Zn", "-Wn", "-n", "striped", "-i", "2", "-L", "2m", "vg") // not linear
	run("lvcreate", "-an", "-Zn", "-Wn", "-n", "across", "-L", "70m", "vg")            // two disks
	report = run("lvs", "--noheadings", "--segments", "--units", "b", "--nosuffix", "-o", "lv_name,seg_start,devices", "vg")
	return images, strings.NewReplacer(loops[0], "0", loops[1], "1").Replace(report)
}

func TestVolumes(t *testing.T) {
	images, report := groupImages(t)
	var places []string
	var pvs []*PV
	for _, image := range images {
		r, size := diskfstest.Open(t, image)
		pv, err := ReadPV(r, size)
		if err != nil {
			t.Fatal(err)
		}
		pvs = append(pvs, pv)
	}
	want := map[string]int64{"small": 16 << 20, "between": 4 << 20, "across": 70 << 20, "striped": 2 << 20}
	vols := Volumes(pvs)
	if len(vols) != len(want) {
		t.Errorf("%d volumes", len(vols))
	}
	for _, v := range vols {
		t.Logf("%s/%s: %d bytes in %d segments, %v", v.Group, v.Name, v.Size, len(v.segments), v.Err)
		if v.Group != "vg" || want[v.Name] != v.Size {
			t.Errorf("volume %s/%s of %d bytes", v.Group, v.Name, v.Size)
		}
		if v.Name == "striped" {
			if !errors.Is(v.Err, diskfs.ErrUnsupported) || !strings.Contains(v.Err.Error(), "2 stripes") {
				t.Errorf("striped: %v", v.Err)
			}
			continue
		}
		if v.Err != nil {
			t.Errorf("%s: %v", v.Name, v.Err)
			continue
		}
		if v.Name != "between" && len(v.segments) != 2 {
			t.Errorf("%s has %d segments", v.Name, len(v.segments))
		}
		checkSegments(t, v, images, pvs)
		for _, s := range v.segments {
			// Extents are of 1 MiB and begin 1 MiB into the physical volume.
			places = append(places, fmt.Sprintf("%s %d %d(%d)", v.Name, s.start, slices.Index(pvs, s.pv), s.offset>>20-1))
		}
	}
	var reported []string
	for line := range strings.Lines(report) {
		if f := strings.Fields(line); f[0] != "striped" {
			reported = append(reported, strings.Join(f, " "))
		}
	}
	slices.Sort(places)
	slices.Sort(reported)
	if !slices.Equal(places, reported) {
		t.Errorf("segments %q, LVM says %q", places, reported)
	}
	// One of the two disks alone.
	for _, v := range Volumes(pvs[:1]) {
		if missing := v.Name == "across"; missing != (v.Err != nil && strings.Contains(v.Err.Error(), "not on this disk")) && v.Name != "striped" {
			t.Errorf("%s on one disk: %v", v.Name, v.Err)
		}
	}
}

// checkSegments writes a mark at each segment's place and reads the marks through the
// volume.
func checkSegments(t *testing.T, v *Volume, images [2]string, pvs []*PV) {
	t.Helper()
	for i, s := range v.segments {
		image := images[0]
		if s.pv == pvs[1] {
			image = images[1]
		}
		f, err := os.OpenFile(image, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		mark := []byte(v.Name + "-segment-" + string(rune('0'+i)))
		// Data begins 1 MiB into a physical volume; extents are of 1 MiB.
		if _, err := f.WriteAt(mark, s.offset); err != nil || s.offset%(1<<20) != 0 || s.offset == 0 {
			t.Fatalf("segment at %d: %v", s.offset, err)
		}
		f.Close()
		got := make([]byte, len(mark))
		if _, err := v.ReadAt(got, s.start); err != nil || !bytes.Equal(got, mark) {
			t.Errorf("%s segment %d: %q, %v", v.Name, i, got, err)
		}
	}
	// Over the border of segments, and over the end.
	b := make([]byte, 8192)
	if len(v.segments) == 2 {
		if n, err := v.ReadAt(b, v.segments[1].start-4096); n != len(b) || err != nil {
			t.Errorf("%s: %d, %v", v.Name, n, err)
		}
		if !bytes.HasPrefix(b[4096:], []byte(v.Name+"-segment-1")) {
			t.Errorf("%s: second segment begins with %q", v.Name, b[4096:4120])
		}
	}
	if n, err := v.ReadAt(b, v.Size-100); n != 100 || !errors.Is(err, io.EOF) {
		t.Errorf("%s at its end: %d, %v", v.Name, n, err)
	}
}

func TestParseConfig(t *testing.T) {
	s, err := parseConfig("# comment\nvg {\n id = \"a\\\"b\" # more\n n = 42\n list = [\"x\", 7,\n]\n sub { deep = 1.5 }\n}\nversion = 1\n\x00")
	if err != nil {
		t.Fatal(err)
	}
	vg := s.section("vg")
	if vg.text("id") != `a"b` || vg.number("n") != 42 || len(vg.list("list")) != 2 || vg.section("sub").text("deep") != "1.5" || s.number("version") != 1 {
		t.Errorf("parsed %v", s)
	}
	for _, bad := range []string{"a", "a =", "a {", "}", "a = \"x", "a = [", "a = [[1]]", "=", "a = 1\na = 2", strings.Repeat("a {", 100), "a {\n}}"} {
		if s, err := parseConfig(bad); err == nil {
			t.Errorf("%q parsed as %v", bad, s)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add("vg {\n id = \"a\"\n list = [\"x\", 7]\n sub { deep = 1.5 }\n}\n")
	f.Fuzz(func(t *testing.T, text string) {
		_, _ = parseConfig(text)
	})
}

// FuzzVolumes: metadata of any text gives volumes within the physical volume.
func FuzzVolumes(f *testing.F) {
	f.Add(`vg { id = "g" seqno = 1 extent_size = 8 physical_volumes { pv0 { id = "p" pe_start = 2048 } }
logical_volumes { lv { id = "l" status = ["VISIBLE"] segment_count = 1 segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 0] } } } }`)
	disk := make([]byte, 2<<20)
	f.Fuzz(func(t *testing.T, text string) {
		pv := &PV{UUID: "p", r: bytes.NewReader(disk), size: int64(len(disk))}
		if pv.setGroup(text) != nil {
			return
		}
		b := make([]byte, 100)
		for _, v := range Volumes([]*PV{pv}) {
			if v.Err != nil {
				continue
			}
			for _, off := range []int64{0, v.Size / 2, v.Size - 50} {
				if _, err := v.ReadAt(b, max(off, 0)); err != nil && !errors.Is(err, io.EOF) {
					t.Errorf("%s: read %d of %d: %v", v.Name, off, v.Size, err)
				}
			}
		}
	})
}

// FuzzReadPV changes the bytes of a physical volume's start.
func FuzzReadPV(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("making a volume group needs root")
	}
	if _, err := exec.LookPath("lvm"); err != nil {
		f.Skipf("needs lvm: %v", err)
	}
	images, _ := groupImages(f)
	b, err := os.ReadFile(images[0])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:16<<10])
	f.Fuzz(func(t *testing.T, head []byte) {
		disk := make([]byte, 2<<20)
		copy(disk, head)
		if pv, err := ReadPV(bytes.NewReader(disk), int64(len(disk))); err == nil {
			Volumes([]*PV{pv})
		}
	})
}

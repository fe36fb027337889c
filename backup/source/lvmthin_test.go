package source_test

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/source"
)

const (
	mondayUUID  = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-000001"
	tuesdayUUID = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-000002"
)

// thinPrograms stand in for those of LVM 2.03 and thin-provisioning-tools 0.9: written by
// hand after their manuals, not captured.
var thinPrograms = map[string]string{
	"lvs": `[ "$LVM_SUPPRESS_FD_WARNINGS" = 1 ] || exit 4
case "$*" in *" -- vg-1") cat "$dir/lvs.json" ;; *) echo "  Volume group \"none\" not found" >&2; exit 5 ;; esac`,
	"dmsetup": `case "$*" in
"message vg--1-pool-tpool 0 reserve_metadata_snap") mkdir "$dir/reserved" 2>/dev/null || { echo "device-mapper: message ioctl on vg--1-pool-tpool failed: Device or resource busy" >&2; exit 1; } ;;
"message vg--1-pool-tpool 0 release_metadata_snap") rmdir "$dir/reserved" ;;
*) exit 1 ;; esac`,
	"thin_delta": `[ -d "$dir/reserved" ] || { echo "no metadata snapshot" >&2; exit 1; }
case "$*" in
"--metadata-snap --snap1 3 --snap2 7 /dev/mapper/vg--1-pool_tmeta") cat "$dir/delta.xml" ;;
*) echo "Unknown snap id" >&2; exit 1 ;; esac`,
}

func thinVolumes(dir string, volumes ...[4]string) string {
	var list []string
	for _, v := range volumes {
		list = append(list, fmt.Sprintf(`{"lv_uuid":"%s", "lv_name":"%s", "pool_lv":"%s", "thin_id":"%s", "lv_path":"%s", "lv_active":"active"}`,
			v[0], v[1], v[2], v[3], filepath.Join(dir, v[1])))
	}
	return `{"report": [{"lv": [` + strings.Join(list, ",\n") + "]}]}\n"
}

// TestLVMThin has output that the programs of LVM printed: no thin pool is involved.
func TestLVMThin(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range thinPrograms {
		put(name, "#!/bin/sh\ndir='"+dir+"'\n"+text+"\n", 0o700)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	disk := bytes.Repeat([]byte("monday  "), 1<<18)
	put("monday", string(disk), 0o600)
	monday, tuesday := [4]string{mondayUUID, "monday", "pool", "3"}, [4]string{tuesdayUUID, "tuesday", "pool", "7"}
	plain, other := [4]string{"aaaaaa-bbbb-cccc-dddd-eeee-ffff-000003", "plain", "", ""}, [4]string{mondayUUID, "monday", "other", "3"}
	put("lvs.json", thinVolumes(dir, monday, plain), 0o600)
	full := take(t, "lvmthin://vg-1/monday", source.Options{}, nil)
	if full.id != mondayUUID || !bytes.Equal(full.bytes, disk) {
		t.Errorf("the full is of %q by %s, or has other bytes", full.id, full.by)
	}

	copy(disk[128<<10:], bytes.Repeat([]byte("tuesday "), 64<<10/8))
	clear(disk[1<<20 : 1<<20+64<<10])
	put("tuesday", string(disk), 0o600)
	put("delta.xml", `<superblock uuid="" time="2" transaction="3" data_block_size="128" nr_data_blocks="64">
  <diff left="3" right="7"><same begin="0" length="2"/><different begin="2" length="1"/><left_only begin="16" length="1"/><same begin="17" length="15"/></diff>
</superblock>
`, 0o600)
	put("lvs.json", thinVolumes(dir, monday, tuesday, plain), 0o600)
	next := take(t, "lvmthin://vg-1/tuesday", source.Options{}, full)
	if next.by != "thin_delta" || next.id != tuesdayUUID || !bytes.Equal(next.bytes, disk) {
		t.Errorf("the increment is by %s (%v), of %q, or has other bytes", next.by, next.why, next.id)
	}
	if _, err := os.Lstat(filepath.Join(dir, "reserved")); err == nil {
		t.Error("the metadata of the pool stays reserved")
	}

	for name, c := range map[string]struct {
		id, lvs, delta string
		reserved       bool
		why            string
	}{
		"no change ID":       {"", "", "", false, "was not made from an earlier snapshot"},
		"an option":          {"--snap1", "", "", false, "was not made from an earlier snapshot"},
		"base is gone":       {mondayUUID, thinVolumes(dir, tuesday), "", false, "is gone"},
		"base elsewhere":     {mondayUUID, thinVolumes(dir, other, tuesday), "", false, "another pool"},
		"reserved by others": {mondayUUID, "", "", true, "release_metadata_snap"},
		"unknown to it":      {mondayUUID, thinVolumes(dir, [4]string{mondayUUID, "monday", "pool", "4"}, tuesday), "", false, "Unknown snap id"},
	} {
		put("lvs.json", cmp.Or(c.lvs, thinVolumes(dir, monday, tuesday)), 0o600)
		if c.reserved {
			if err := os.Mkdir(filepath.Join(dir, "reserved"), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		base := &state{bytes: full.bytes, id: c.id}
		got := take(t, "lvmthin://vg-1/tuesday", source.Options{}, base)
		if got.by != "compare" || got.id != tuesdayUUID || len(got.why) != 1 || !strings.Contains(got.why[0].Error(), c.why) || !bytes.Equal(got.bytes, disk) {
			t.Errorf("%s: by %s (%v), of %q, or other bytes", name, got.by, got.why, got.id)
		}
		if _, err := os.Lstat(filepath.Join(dir, "reserved")); (err == nil) != c.reserved {
			t.Errorf("%s: reserved afterwards: %v", name, err)
		}
		_ = os.Remove(filepath.Join(dir, "reserved"))
	}
	put("lvs.json", thinVolumes(dir, monday, tuesday, plain), 0o600)
	// A list that is cut is no list.
	put("delta.xml", `<superblock data_block_size="128"><diff left="3" right="7"><different begin="2" length="1"/>`, 0o600)
	s, err := source.Open(t.Context(), "lvmthin://vg-1/tuesday", source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := takeDisk(t.Context(), s.Disks()[0], full); err == nil {
		t.Error("a list that is cut was taken for whole")
	}
	_ = s.Close()
	for _, uri := range []string{"lvmthin://vg-1", "lvmthin://-x/a", "lvmthin://vg/-a", "lvmthin://vg/a/b", "lvmthin://vg/a?x", "lvmthin://vg/a b"} {
		if _, err := source.Open(t.Context(), uri, source.Options{}); !errors.Is(err, source.ErrURI) {
			t.Errorf("%s: %v", uri, err)
		}
	}
	for uri, want := range map[string]string{
		"lvmthin://none/a": "not found", "lvmthin://vg-1/sunday": "no such logical volume", "lvmthin://vg-1/plain": "no thin pool",
	} {
		if _, err := source.Open(t.Context(), uri, source.Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", uri, err)
		}
	}
	put("lvs.json", strings.ReplaceAll(thinVolumes(dir, tuesday), `"lv_active":"active"`, `"lv_active":""`), 0o600)
	if _, err := source.Open(t.Context(), "lvmthin://vg-1/tuesday", source.Options{}); err == nil || !strings.Contains(err.Error(), "lvchange -ay -K") {
		t.Errorf("one that is not active: %v", err)
	}
	put("lvs.json", `{"report": [{"lv": [{"lv_uuid":"x", "lv_name":"tuesday", "thin_id":"../7"}]}]}`, 0o600)
	if _, err := source.Open(t.Context(), "lvmthin://vg-1/tuesday", source.Options{}); err == nil {
		t.Error("nonsense was read")
	}
}

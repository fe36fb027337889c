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
	diskUUID    = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-000000"
	mondayUUID  = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-000001"
	tuesdayUUID = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-000002"
	plainUUID   = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-000003"
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

// thinVolumes is what lvs prints of the thin volume "disk" and others: UUID, name, pool, thin ID and origin.
func thinVolumes(dir string, volumes ...[5]string) string {
	var list []string
	for _, v := range append(volumes, [5]string{diskUUID, "disk", "pool", "1", ""}) {
		list = append(list, fmt.Sprintf(`{"lv_uuid":"%s", "lv_name":"%s", "pool_lv":"%s", "thin_id":"%s", "lv_path":"%s", "lv_active":"active", "origin_uuid":"%s"}`,
			v[0], v[1], v[2], v[3], filepath.Join(dir, v[1]), v[4]))
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
	put("disk", string(disk), 0o600)
	monday, tuesday := [5]string{mondayUUID, "monday", "pool", "3", diskUUID}, [5]string{tuesdayUUID, "tuesday", "pool", "7", diskUUID}
	plain, other := [5]string{plainUUID, "plain", "", "", ""}, [5]string{mondayUUID, "monday", "other", "3", diskUUID}
	of := func(v [5]string, origin string) [5]string { v[4] = origin; return v }
	put("lvs.json", thinVolumes(dir, monday, plain), 0o600)
	full := take(t, "lvmthin://vg-1/monday", source.Options{}, nil)
	if full.id != mondayUUID || !bytes.Equal(full.bytes, disk) {
		t.Errorf("the full is of %q by %s, or has other bytes", full.id, full.by)
	}

	copy(disk[128<<10:], bytes.Repeat([]byte("tuesday "), 64<<10/8))
	clear(disk[1<<20 : 1<<20+64<<10])
	copy(disk[1<<20+64<<10:], bytes.Repeat([]byte("outside "), 64<<10/8)) // of an external origin
	put("tuesday", string(disk), 0o600)
	head := `<superblock uuid="" time="2" transaction="3" data_block_size="128" nr_data_blocks="64"><diff left="3" right="7">`
	delta := head + `<same begin="0" length="2"/><different begin="2" length="1"/><left_only begin="16" length="2"/><same begin="18" length="14"/></diff></superblock>`
	put("delta.xml", delta, 0o600)
	put("lvs.json", thinVolumes(dir, monday, tuesday, plain), 0o600)
	next := take(t, "lvmthin://vg-1/tuesday", source.Options{}, full)
	if next.by != "thin_delta" || next.id != tuesdayUUID || !bytes.Equal(next.bytes, disk) {
		t.Errorf("the increment is by %s (%v), of %q, or has other bytes", next.by, next.why, next.id)
	}
	if _, err := os.Lstat(filepath.Join(dir, "reserved")); err == nil {
		t.Error("the metadata of the pool stays reserved")
	}

	for name, c := range map[string]struct {
		id, lvs  string
		reserved bool
		why      string
		next     string // the change ID
	}{
		"no change ID":       {"", "", false, "was not made from an earlier snapshot", tuesdayUUID},
		"an option":          {"--snap1", "", false, "was not made from an earlier snapshot", tuesdayUUID},
		"base is gone":       {mondayUUID, thinVolumes(dir, tuesday), false, "is gone", tuesdayUUID},
		"base elsewhere":     {mondayUUID, thinVolumes(dir, other, tuesday), false, "another pool", tuesdayUUID},
		"reserved by others": {mondayUUID, "", true, "release_metadata_snap", tuesdayUUID},
		"unknown to it":      {mondayUUID, thinVolumes(dir, [5]string{mondayUUID, "monday", "pool", "4", diskUUID}, tuesday), false, "Unknown snap id", tuesdayUUID},
		// What was written to monday after its backup, tuesday shares with it.
		"base is the origin":     {mondayUUID, thinVolumes(dir, monday, of(tuesday, mondayUUID)), false, "same volume", tuesdayUUID},
		"base is the disk":       {diskUUID, thinVolumes(dir, tuesday), false, "same volume", tuesdayUUID},
		"a volume between":       {mondayUUID, thinVolumes(dir, monday, [5]string{plainUUID, "between", "pool", "5", mondayUUID}, of(tuesday, plainUUID)), false, "same volume", tuesdayUUID},
		"a removed one between":  {mondayUUID, thinVolumes(dir, monday, of(tuesday, "")), false, "same volume", ""},
		"origins are gone":       {mondayUUID, thinVolumes(dir, of(monday, ""), of(tuesday, "")), false, "same volume", ""},
		"of one external origin": {mondayUUID, thinVolumes(dir, of(monday, plainUUID), of(tuesday, plainUUID), plain), false, "same volume", ""},
	} {
		put("lvs.json", cmp.Or(c.lvs, thinVolumes(dir, monday, tuesday)), 0o600)
		put("delta.xml", delta, 0o600)
		if c.why == "same volume" {
			put("delta.xml", head+`<same begin="0" length="32"/></diff></superblock>`, 0o600)
		}
		if c.reserved {
			if err := os.Mkdir(filepath.Join(dir, "reserved"), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		base := &state{bytes: full.bytes, id: c.id}
		got := take(t, "lvmthin://vg-1/tuesday", source.Options{}, base)
		if got.by != "compare" || got.id != c.next || len(got.why) != 1 || !strings.Contains(got.why[0].Error(), c.why) || !bytes.Equal(got.bytes, disk) {
			t.Errorf("%s: by %s (%v), of %q, or other bytes", name, got.by, got.why, got.id)
		}
		if _, err := os.Lstat(filepath.Join(dir, "reserved")); (err == nil) != c.reserved {
			t.Errorf("%s: reserved afterwards: %v", name, err)
		}
		_ = os.Remove(filepath.Join(dir, "reserved"))
	}
	put("lvs.json", thinVolumes(dir, monday, tuesday, plain), 0o600)
	// A volume that goes on to be written to is no state.
	s, err := source.Open(t.Context(), "lvmthin://vg-1/disk", source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got, notes := takeSession(t, s, nil), s.Disks()[0].Notes; got.id != "" || len(notes) != 1 || !strings.Contains(notes[0], "vg-1/disk is no snapshot") {
		t.Errorf("the disk itself has the change ID %q, notes %q", got.id, notes)
	}
	_ = s.Close()
	// A list that is cut is no list.
	put("delta.xml", `<superblock data_block_size="128"><diff left="3" right="7"><different begin="2" length="1"/>`, 0o600)
	if s, err = source.Open(t.Context(), "lvmthin://vg-1/tuesday", source.Options{}); err != nil {
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

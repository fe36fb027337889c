package source_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// rbdScript prints what Ceph 17.2 prints.
const rbdScript = `#!/bin/sh
case "$*" in
"info --format json -- pool/image")
	echo '{"name":"image","id":"'$(cat "$0.image")'","size":12582912,"objects":3,"order":22,"object_size":4194304,"snapshot_count":2,"format":2}' ;;
"snap ls --format json -- pool/image") cat "$0.snaps" ;;
"diff --format json -- pool/image@monday")
	echo '[{"offset":0,"length":4194304,"exists":"true"},{"offset":8388608,"length":4194304,"exists":"true"}]' ;;
"diff --format json --from-snap monday -- pool/image@tuesday")
	echo '[{"offset":1048576,"length":4096,"exists":"true"},{"offset":8388608,"length":4194304,"exists":"false"}]' ;;
"diff --format json --from-snap cut "*)
	echo '[{"offset":1048576,"length":4096,"exists":"true"},' ;;
*)
	echo "rbd: error opening snapshot: (2) No such file or directory" >&2
	exit 2 ;;
esac
`

// rbdSnaps is what rbd prints of the snapshots monday, of an ID, and tuesday.
func rbdSnaps(monday string) []byte {
	return []byte(`[{"id":` + monday + `,"name":"monday","size":12582912,"protected":"false","timestamp":"Mon Nov 30 12:00:00 2026"},` +
		`{"id":5,"name":"tuesday","size":12582912,"protected":"false","timestamp":"Tue Dec  1 12:00:00 2026"}]`)
}

// TestRBD has captured output of rbd, and a qemu-nbd that opens a file in place of the snapshot:
// no Ceph cluster is involved.
func TestRBD(t *testing.T) {
	diskfstest.NeedTool(t, "qemu-nbd")
	real, err := exec.LookPath("qemu-nbd")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	disk := make([]byte, 12<<20)
	copy(disk, bytes.Repeat([]byte("monday"), 4<<20/6))
	copy(disk[8<<20:], bytes.Repeat([]byte("before"), 4<<20/6))
	snapshots := filepath.Join(dir, "disk.")
	qemuNBD := "#!/bin/sh\nfor a; do shift; case $a in rbd:pool/image@*) a=" + snapshots + "${a#*@} ;; esac; set -- \"$@\" \"$a\"; done\nexec " + real + " \"$@\"\n"
	for name, content := range map[string][]byte{"rbd": []byte(rbdScript), "qemu-nbd": []byte(qemuNBD), "disk.monday": disk, "rbd.image": []byte("10f86b8b4567"), "rbd.snaps": rbdSnaps("4")} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	full := take(t, "rbd://pool/image@monday", source.Options{}, nil)
	if full.by != "rbd-diff" || full.id != "monday@4@10f86b8b4567" || !bytes.Equal(full.bytes, disk) {
		t.Errorf("the full is by %s (%v), of %q, or has other bytes", full.by, full.why, full.id)
	}
	copy(disk[1<<20:], "tuesday")
	clear(disk[8<<20:])
	if err := os.WriteFile(snapshots+"tuesday", disk, 0o600); err != nil {
		t.Fatal(err)
	}
	next := take(t, "rbd://pool/image@tuesday", source.Options{}, full)
	if next.by != "rbd-diff" || next.id != "tuesday@5@10f86b8b4567" || !bytes.Equal(next.bytes, disk) {
		t.Errorf("the increment is by %s (%v), of %q, or has other bytes", next.by, next.why, next.id)
	}
	// A name that was given to a later snapshot, another image, the form of earlier versions.
	for _, id := range []string{"monday@3@10f86b8b4567", "monday@4@10f86b8b4568", "monday", "sunday@2@10f86b8b4567", "tuesday@5@10f86b8b4567", "--option@4@10f86b8b4567", "sunday", "--option", ""} {
		full.id = id
		if next = take(t, "rbd://pool/image@tuesday", source.Options{}, full); next.by != "allocation" || len(next.why) != 1 || !bytes.Equal(next.bytes, disk) {
			t.Errorf("of the snapshot %q: by %s (%v), or other bytes", id, next.by, next.why)
		}
	}
	// The name is given to another snapshot while rbd compares.
	full.id = "monday@4@10f86b8b4567"
	swap := strings.Replace(rbdScript, "-- pool/image@tuesday\")\n", "-- pool/image@tuesday\")\n\tmv \"$0.later\" \"$0.snaps\"\n", 1)
	for name, content := range map[string][]byte{"rbd": []byte(swap), "rbd.later": rbdSnaps("6")} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if next = take(t, "rbd://pool/image@tuesday", source.Options{}, full); next.by != "allocation" || len(next.why) != 1 || !strings.Contains(next.why[0].Error(), "made later") {
		t.Errorf("of a snapshot that was replaced: by %s (%v)", next.by, next.why)
	}
	for _, uri := range []string{"rbd://pool/image", "rbd://pool/image@a:conf=/etc/passwd", "rbd://image@a", "rbd://pool/a/b/c@d", "rbd://pool/image@a?x", "rbd://-p/image@a"} {
		if _, err := source.Open(t.Context(), uri, source.Options{}); !errors.Is(err, source.ErrURI) {
			t.Errorf("%s: %v", uri, err)
		}
	}
	if _, err := source.Open(t.Context(), "rbd://pool/image@wednesday", source.Options{}); err == nil || !strings.Contains(err.Error(), "qemu-block-extra") {
		t.Errorf("a snapshot that is not there: %v", err)
	}
}

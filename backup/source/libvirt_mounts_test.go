package source_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestLibvirtHoldsNoMounts: a libvirt of the tests begins with the mounts of other tests, and has to let go of
// them when those do: what is mounted somewhere keeps its device busy.
func TestLibvirtHoldsNoMounts(t *testing.T) {
	t.Parallel()
	diskfstest.NeedTool(t, "libvirtd")
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	dir, err := os.MkdirTemp("/tmp", "libvirt-") // short, as a socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	// Mounts are shared as they are for all tests (scripts/test.sh).
	out, err := exec.Command("unshare", "--mount", "--propagation", "slave", "sh", "-ec", `
		mount --make-rshared /
		mkdir "$0/other" "$0/libvirt"
		mount -t tmpfs none "$0/other"
		unshare -m --propagation slave testdata/libvirtd.sh "$0/libvirt" >"$0/log" 2>&1 &
		pid=$!
		trap 'kill $pid; wait $pid || :' EXIT
		n=0
		until [ -e "$0/libvirt/libvirt-sock" ]; do
			n=$((n + 1)); [ $n -lt 3000 ] || { cat "$0/log"; exit 1; }
			sleep 0.1
		done
		held() { grep -c " $0/other " /proc/$pid/mountinfo || :; }
		held
		umount "$0/other"
		held
	`, dir).CombinedOutput()
	if got := strings.Fields(string(out)); err != nil || len(got) != 2 || got[0] != "1" || got[1] != "0" {
		t.Errorf("libvirt has the mount before and after it was unmounted: %q, %v; want 1 and 0", out, err)
	}
}

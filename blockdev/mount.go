package blockdev

import (
	"fmt"
	"os/exec"
	"strings"
)

// Mount mounts the file system on a device with the kernel at a directory, read-only. The
// type is as for mount(8); empty to detect it.
func Mount(device, typ, dir string) error {
	// No set-ID programs and devices of an untrusted disk.
	options := "ro,nosuid,nodev"
	if typ == "xfs" {
		options += ",nouuid" // the disk itself may be mounted as well
	}
	args := []string{"-o", options, device, dir}
	if typ != "" {
		args = append([]string{"-t", typ}, args...)
	}
	out, err := exec.Command("mount", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mount with the kernel: %w: %s", err, strings.Join(strings.Fields(string(out)), " "))
	}
	return nil
}

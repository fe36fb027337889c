package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// identity names the disk itself, not its path. Device numbers and inodes alone do not: they
// are reused after a restart or a deletion. So a device adds its size and the names that
// hardware or driver give it, a file its time of creation if the file system has it.
func (h *handle) identity() (string, error) {
	if h.device {
		number := fmt.Sprintf("%d:%d", unix.Major(h.number), unix.Minor(h.number))

		text := fmt.Sprintf("device %s %d", number, h.size)
		if name := serial("/sys/dev/block/"+number, allNames); name != "" {
			text += " " + name
		}
		return text, nil
	}

	var st unix.Statx_t

	err := control(h.buffered, func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME, &st)
	})
	if err != nil {
		return "", fmt.Errorf("identify %s: %w", h.path, err)
	}

	text := fmt.Sprintf("file %d:%d %d", st.Dev_major, st.Dev_minor, st.Ino)
	if st.Mask&unix.STATX_BTIME != 0 {
		text += fmt.Sprintf(" %d.%09d", st.Btime.Sec, st.Btime.Nsec)
	}
	return text, nil
}

// Attributes in sysfs that name a device. Those of the hardware are the same wherever the
// disk is attached. A device mapper target or a loop device may be another disk next time,
// or, for a snapshot, have another name for the same disk.
var (
	hardwareNames = []string{"wwid", "device/wwid", "serial", "device/serial", "device/cid", "md/uuid"}
	allNames      = append(slices.Clone(hardwareNames), "dm/uuid", "loop/backing_file")
)

// serial reads the name of a device from sysfs: WWN, serial number, UUID of a device mapper
// target or RAID, backing file of a loop device, with the number of the partition. Empty if
// there is none.
func serial(dir string, names []string) string {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return ""
	}

	suffix := ""
	if number := attribute(dir, "partition"); number != "" {
		suffix = " partition " + number
		dir = filepath.Dir(dir)
	}

	for _, name := range names {
		if text := attribute(dir, name); text != "" {
			return text + suffix
		}
	}
	return ""
}

func attribute(dir, name string) string {
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

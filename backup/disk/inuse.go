package disk

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// writtenTo says how a disk is in use by something that may write to it: a
// read-write mount of it or of one of its partitions, a mapping that stands on
// it, swap, or for a file a loop device. It is empty for an idle disk.
func writtenTo(i info) (string, error) { return usage(i, false) }

// inUse is writtenTo, and counts read-only uses too: what is mounted read-only
// must not be overwritten either.
func inUse(i info) (string, error) { return usage(i, true) }

func usage(i info, readOnlyToo bool) (string, error) {
	if !i.device {
		return fileUsage(i, readOnlyToo)
	}
	devs := familyOf(i.rdev)
	mounts, err := readMounts()
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		if devs[m.dev] && (readOnlyToo || !m.readOnly) {
			return fmt.Sprintf("%s is mounted on %s", m.source, m.point), nil
		}
	}
	if s := swapOn(devs); s != "" {
		return s, nil
	}
	for dev := range devs {
		names, _ := filepath.Glob(fmt.Sprintf("/sys/dev/block/%d:%d/holders/*", unix.Major(dev), unix.Minor(dev)))
		for _, name := range names {
			return fmt.Sprintf("%s stands on it", filepath.Base(name)), nil
		}
	}
	return "", nil
}

// familyOf returns a device and its partitions, by number.
func familyOf(dev uint64) map[uint64]bool {
	out := map[uint64]bool{dev: true}
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev))
	parts, _ := filepath.Glob(filepath.Join(dir, "*", "partition"))
	for _, p := range parts {
		if d, ok := readDevNumber(filepath.Join(filepath.Dir(p), "dev")); ok {
			out[d] = true
		}
	}
	// A mounted whole disk shows through each of its partitions, and the other
	// way round; the whole disk of a partition counts only as itself.
	return out
}

func readDevNumber(path string) (uint64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	return parseDevNumber(strings.TrimSpace(string(b)))
}

func parseDevNumber(s string) (uint64, bool) {
	maj, minor, ok := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(maj, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	if !ok || errors.Join(err1, err2) != nil {
		return 0, false
	}
	return unix.Mkdev(uint32(a), uint32(b)), true
}

type mount struct {
	dev           uint64
	readOnly      bool
	point, source string
}

// readMounts reads /proc/self/mountinfo (proc(5)). A mount counts as read-only
// if the file system itself is: a read-only bind mount of a writable one does
// not keep it from changing.
func readMounts() ([]mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	var out []mount
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		sep := -1
		for i, s := range fields {
			if s == "-" && i >= 6 {
				sep = i
				break
			}
		}
		if sep < 0 || len(fields) < sep+4 {
			continue
		}
		dev, ok := parseDevNumber(fields[2])
		if !ok {
			continue
		}
		out = append(out, mount{
			dev: dev, point: unescapeMount(fields[4]), source: unescapeMount(fields[sep+2]),
			readOnly: strings.HasPrefix(fields[sep+3]+",", "ro,"),
		})
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return out, nil
}

// unescapeMount undoes the octal escapes of blanks in mountinfo.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

func swapOn(devs map[uint64]bool) string {
	b, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return ""
	}
	for i, line := range strings.Split(string(b), "\n") {
		fields := strings.Fields(line)
		if i == 0 || len(fields) == 0 {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(fields[0], &st) == nil && devs[st.Rdev] && st.Rdev != 0 {
			return fields[0] + " is swap"
		}
	}
	return ""
}

// fileUsage finds loop devices over an image file.
func fileUsage(i info, readOnlyToo bool) (string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return "", fmt.Errorf("list loop devices: %w", err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			continue // being torn down
		}
		backing := strings.TrimSuffix(string(b), "\n")
		var st unix.Stat_t
		if unix.Stat(backing, &st) != nil || st.Dev != i.rdev || st.Ino != i.inode {
			continue
		}
		dir := filepath.Dir(filepath.Dir(name))
		if ro, err := os.ReadFile(filepath.Join(dir, "ro")); err == nil && strings.TrimSpace(string(ro)) == "1" && !readOnlyToo {
			continue
		}
		return "/dev/" + filepath.Base(dir) + " is a loop device over it", nil
	}
	return "", nil
}

package disk

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mounts looks for the device in /proc/self/mountinfo (proc(5)), by number and, since
// btrfs and others mount under an anonymous number, by the name of the source.
func (s *survey) mounts(number uint64, name string) error {
	text, err := os.ReadFile(filepath.Join(s.proc, "self/mountinfo"))
	if err != nil {
		return err
	}

	mounts, err := parseMountinfo(bytes.NewReader(text))
	if err != nil {
		return err
	}

	for _, m := range mounts {
		match := m.device == number
		if !match && unix.Major(m.device) == 0 && strings.HasPrefix(m.source, "/") {
			if info, err := os.Stat(m.source); err == nil {
				n, ok := rdevOf(info)
				match = ok && n == number
			}
		}

		if match {
			s.add(Use{Kind: Mounted, Device: name, By: m.point, ReadOnly: m.readOnly})
		}
	}
	return nil
}

type mount struct {
	device        uint64
	point, source string
	readOnly      bool // the file system, not only this mount of it
}

func parseMountinfo(r io.Reader) ([]mount, error) {
	var mounts []mount

	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20) // overlay mounts have very long options

	for lines.Scan() {
		// ID parent major:minor root point options [optional...] - type source superoptions
		before, after, ok := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)

		if !ok || len(left) < 6 || len(right) < 2 {
			continue
		}

		number, ok := parseDeviceNumber(left[2])
		if !ok {
			continue
		}

		m := mount{device: number, point: unescape(left[4]), source: unescape(right[1])}

		// A mount may be read-only and its file system still writable elsewhere, so
		// the options of the superblock decide.
		if len(right) > 2 {
			first, _, _ := strings.Cut(right[2], ",")
			m.readOnly = first == "ro"
		}

		mounts = append(mounts, m)
	}
	return mounts, lines.Err()
}

// unescape decodes the octal escapes of mountinfo and swaps.
func unescape(s string) string {
	var out []byte

	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out = append(out, byte(c))
				i += 3

				continue
			}
		}

		out = append(out, s[i])
	}
	return string(out)
}

// swaps searches /proc/swaps.
func (s *survey) swaps(match func(fs.FileInfo) bool, name string) error {
	text, err := os.ReadFile(filepath.Join(s.proc, "swaps"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a kernel without swap
	} else if err != nil {
		return err
	}

	for i, line := range strings.Split(string(text), "\n") {
		fields := strings.Fields(line)
		if i == 0 || len(fields) == 0 {
			continue
		}

		if info, err := os.Stat(unescape(fields[0])); err == nil && match(info) {
			s.add(Use{Kind: Swap, Device: name, By: "the kernel"})
		}
	}
	return nil
}

// btrfs checks whether the device is a member of a mounted btrfs, of which mountinfo names
// only one device.
func (s *survey) btrfs(base, name string) error {
	members, err := filepath.Glob(filepath.Join(s.sys, "fs/btrfs/*/devices", base))
	if err != nil {
		return err
	}

	for _, u := range s.uses {
		if u.Kind == Mounted && u.Device == name {
			return nil // already listed
		}
	}

	for _, m := range members {
		s.add(Use{Kind: Mounted, Device: name, By: "btrfs " + filepath.Base(filepath.Dir(filepath.Dir(m)))})
	}
	return nil
}

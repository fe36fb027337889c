package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// UseKind is a way in which a disk is used.
type UseKind string

// The uses that are recognised.
const (
	// Mounted: a file system on the disk is mounted.
	Mounted UseKind = "mounted"
	// Swap: the kernel swaps to it.
	Swap UseKind = "swap"
	// Held: another device is on top of it (LVM, RAID, dm-crypt, bcache). What that device is
	// used for is listed too.
	Held UseKind = "held"
	// Looped: a loop device is on top of the image file.
	Looped UseKind = "looped"
	// Claimed: it is opened exclusively, and nothing above explains it: a mount in another
	// mount namespace (another container), ZFS, a program.
	Claimed UseKind = "claimed"
	// Locked: another program, such as a restore, holds a lock (flock) on the image file.
	Locked UseKind = "locked"
	// Opened: QEMU, such as a virtual machine, has the image file open.
	Opened UseKind = "opened"
)

// Use is one way in which a disk, a partition of it or a device on top of it is used.
type Use struct {
	Kind UseKind
	// Device is the name of the device used, which may be a partition of the disk.
	Device string
	// By is the mount point, the holder or the loop device.
	By string
	// ReadOnly means that this use does not write.
	ReadOnly bool
}

func (u Use) String() string {
	how := ""
	if u.ReadOnly {
		how = " read-only"
	}

	switch u.Kind {
	case Mounted:
		return fmt.Sprintf("%s is mounted%s at %s", u.Device, how, u.By)
	case Swap:
		return fmt.Sprintf("%s is swapped to", u.Device)
	case Held, Looped:
		return fmt.Sprintf("%s carries %s", u.Device, u.By)
	case Locked:
		return fmt.Sprintf("%s is locked by another restore, or another program that writes to it", u.Device)
	case Opened:
		return fmt.Sprintf("%s is open%s in QEMU, such as a running virtual machine", u.Device, how)
	default:
		return fmt.Sprintf("%s is open exclusively by another program or container", u.Device)
	}
}

// InUseError refuses a disk because of its uses.
type InUseError struct {
	Path string
	Uses []Use
	// Advice says what to do.
	Advice string
}

func (e *InUseError) Error() string {
	uses := make([]string, len(e.Uses))
	for i, u := range e.Uses {
		uses[i] = u.String()
	}
	return fmt.Sprintf("%s: %v: %s; %s", e.Path, ErrMounted, strings.Join(uses, ", "), e.Advice)
}

// Unwrap returns ErrMounted.
func (e *InUseError) Unwrap() error { return ErrMounted }

// Uses lists how the disk at path is used, as far as this mount namespace and sysfs show. It
// opens a device exclusively for a moment, to see whether others have it open so.
func Uses(path string) ([]Use, error) {
	info, err := checkKind(path)
	if err != nil {
		return nil, err
	}

	s := newSurvey()
	if err := s.disk(path, info); err != nil {
		return nil, fmt.Errorf("find out how %s is used: %w", path, err)
	}

	if len(s.uses) == 0 && info.Mode()&fs.ModeDevice != 0 && claimed(path) {
		s.add(Use{Kind: Claimed, Device: path})
	}
	return s.uses, nil
}

// claimed reports whether a device is opened exclusively, as by a mount. The only way to know
// is to try, which is itself a claim for a moment: it tries several times, so that two
// concurrent callers do not take each other for a user.
func claimed(path string) bool {
	for try := range 5 {
		if try > 0 {
			time.Sleep(time.Duration(try) * 10 * time.Millisecond)
		}

		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL, 0)
		if err == nil {
			return f.Close() != nil
		}

		if !errors.Is(err, unix.EBUSY) {
			return false // opening it will report the error
		}
	}
	return true
}

// survey gathers uses. The tables of the kernel are read once.
type survey struct {
	proc, sys string
	uses      []Use
	seen      map[uint64]bool // devices already examined
}

func newSurvey() *survey { return &survey{proc: "/proc", sys: "/sys", seen: map[uint64]bool{}} }

func (s *survey) add(u Use) { s.uses = append(s.uses, u) }

func (s *survey) disk(path string, info fs.FileInfo) error {
	if info.Mode()&fs.ModeDevice == 0 {
		return s.file(path, info)
	}

	number, ok := rdevOf(info)
	if !ok {
		return fmt.Errorf("%s has no device number", path)
	}
	return s.device(number, path)
}

// rdevOf returns the number of the block device of info.
func rdevOf(info fs.FileInfo) (uint64, bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode()&fs.ModeDevice == 0 || info.Mode()&fs.ModeCharDevice != 0 {
		return 0, false
	}
	return uint64(st.Rdev), true //nolint:unconvert // its type depends on the architecture
}

// device examines a device, its partitions, the disk that it is a partition of, and the
// devices on top.
func (s *survey) device(number uint64, name string) error {
	if s.seen[number] {
		return nil
	}

	s.seen[number] = true

	if err := s.mounts(number, name); err != nil {
		return err
	}

	if err := s.swaps(func(info fs.FileInfo) bool { n, ok := rdevOf(info); return ok && n == number }, name); err != nil {
		return err
	}

	dir := filepath.Join(s.sys, "dev/block", fmt.Sprintf("%d:%d", unix.Major(number), unix.Minor(number)))

	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // no sysfs in this container
	} else if err != nil {
		return err
	}

	if err := s.btrfs(filepath.Base(real), name); err != nil {
		return err
	}

	holders, err := readDir(filepath.Join(real, "holders"))
	if err != nil {
		return err
	}

	for _, holder := range holders {
		s.add(Use{Kind: Held, Device: name, By: "/dev/" + holder})

		if err := s.named(filepath.Join(real, "holders", holder), holder); err != nil {
			return err
		}
	}

	entries, err := readDir(real)
	if err != nil {
		return err
	}

	for _, entry := range entries {
		if exists(filepath.Join(real, entry, "partition")) {
			if err := s.named(filepath.Join(real, entry), entry); err != nil {
				return err
			}
		}
	}

	if exists(filepath.Join(real, "partition")) {
		// A file system or holder on the whole disk covers this partition too; its
		// other partitions do not.
		return s.wholeDisk(filepath.Dir(real))
	}
	return nil
}

func (s *survey) wholeDisk(dir string) error {
	number, err := readDeviceNumber(dir)
	if err != nil || s.seen[number] {
		return err
	}

	name := "/dev/" + filepath.Base(dir)
	if err := s.mounts(number, name); err != nil {
		return err
	}

	holders, err := readDir(filepath.Join(dir, "holders"))
	for _, holder := range holders {
		s.add(Use{Kind: Held, Device: name, By: "/dev/" + holder})
	}
	return err
}

// named examines the device that sysfs describes in dir.
func (s *survey) named(dir, name string) error {
	number, err := readDeviceNumber(dir)
	if err != nil {
		return err
	}
	return s.device(number, "/dev/"+name)
}

func readDeviceNumber(dir string) (uint64, error) {
	text, err := os.ReadFile(filepath.Join(dir, "dev"))
	if err != nil {
		return 0, err
	}

	number, ok := parseDeviceNumber(strings.TrimSpace(string(text)))
	if !ok {
		return 0, fmt.Errorf("%s/dev holds %q", dir, text)
	}
	return number, nil
}

func parseDeviceNumber(text string) (uint64, bool) {
	major, minor, ok := strings.Cut(text, ":")
	if !ok {
		return 0, false
	}

	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	return unix.Mkdev(uint32(a), uint32(b)), err1 == nil && err2 == nil
}

// file looks for loop devices on an image file, their uses, and swap.
func (s *survey) file(path string, file fs.FileInfo) error {
	s.qemu(path)

	if err := s.swaps(func(info fs.FileInfo) bool { return os.SameFile(info, file) }, path); err != nil {
		return err
	}

	loops, err := filepath.Glob(filepath.Join(s.sys, "block/*/loop/backing_file"))
	if err != nil {
		return err
	}

	for _, attribute := range loops {
		dir := filepath.Dir(filepath.Dir(attribute))

		backing, err := os.ReadFile(attribute)
		if err != nil {
			continue // detached since
		}

		info, err := os.Stat(strings.TrimSuffix(string(backing), "\n"))
		if err != nil || !os.SameFile(info, file) {
			continue
		}

		loop := filepath.Base(dir)
		readOnly, _ := os.ReadFile(filepath.Join(dir, "ro"))
		s.add(Use{Kind: Looped, Device: path, By: "/dev/" + loop, ReadOnly: strings.TrimSpace(string(readOnly)) == "1"})

		before := len(s.uses)
		if err := s.named(dir, loop); err != nil {
			return err
		}

		if len(s.uses) == before && claimed("/dev/"+loop) {
			s.add(Use{Kind: Claimed, Device: "/dev/" + loop})
		}
	}
	return nil
}

func readDir(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}

	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

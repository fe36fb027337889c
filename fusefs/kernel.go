package fusefs

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/fusefs/diskfs/disk"
)

// kernelState is where the trees lie that kernel mounts stand on, one directory for
// each directory that is mounted on.
const kernelState = "/run/varve"

// KernelMounted is a file system of one recovery point, mounted by the kernel.
type KernelMounted struct {
	Dir    string // absolute
	by     BlockDevices
	aside  Aside
	tree   *Mounted     // below a loop device
	device *BlockDevice // else
	handle handle       // of the point, where there is no tree
}

// MountKernel mounts a volume of the FS's only point read-only at dir, with the
// kernel's own driver: on a device that by makes, or, where by is nil, on a loop device
// over disk.img in a tree of its own. The journal, if it needs to be, is replayed into
// the overlay of the disk, so the FS must be writable. volume is a partition's name
// ("p1"), or empty on a disk without partitions.
//
// The device goes with the mount, whoever unmounts. What a killed process left at dir
// is taken away first.
func (f *FS) MountKernel(dir, volume string, by BlockDevices) (m *KernelMounted, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("mounting with the kernel needs root; files can be read without by 'varve mount', 'varve ls' and 'varve cp'")
	}
	if f.opt.Point == nil || !f.opt.Writable {
		return nil, errors.New("mount with the kernel: this needs one recovery point and an overlay")
	}
	if dir, err = absolute(dir); err != nil {
		return nil, err
	}
	if err := CleanKernel(dir, by); err != nil {
		return nil, err
	}
	if st, err := os.Stat(dir); err != nil {
		return nil, noMountpoint(dir, err)
	} else if !st.IsDir() {
		return nil, fmt.Errorf("mount: %s is not a directory", dir)
	}
	p := f.point(f.opt.Point)
	d, err := p.partitions(f.ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.info.Name(), err)
	}
	vol, err := kernelVolume(d, volume)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.info.Name(), err)
	}
	tree := kernelTree(dir)
	if err := os.MkdirAll(tree, 0o700); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	m = &KernelMounted{Dir: dir, by: by, aside: f.opt.Aside}
	if by != nil {
		err = m.onDevice(f.ctx, p, vol)
	} else if m.tree, err = f.Mount(tree); err == nil {
		err = f.mountLoop(filepath.Join(tree, f.diskPath()), loopVolume(vol), dir)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", p.info.Name(), err), m.Close())
	}
	return m, nil
}

// mountDevice mounts the file system on a device.
func mountDevice(device, typ, dir string) error {
	// No programs and devices of a stranger's disk.
	options := "ro,nosuid,nodev"
	if typ == "xfs" {
		options += ",nouuid" // the disk itself may be mounted as well
	}
	args := []string{"-o", options, device, dir}
	if typ != "" {
		args = append([]string{"-t", typ}, args...)
	}
	out, err := exec.Command("mount", args...).CombinedOutput() //nolint:gosec // names checked by diskfs and this package
	if err != nil {
		return fmt.Errorf("mount with the kernel: %w: %s", err, strings.Join(strings.Fields(string(out)), " "))
	}
	return nil
}

// diskPath is where disk.img of the FS's only point lies in the tree.
func (f *FS) diskPath() string {
	for ns, volumes := range f.view.Load().namespaces {
		for name, v := range volumes {
			return filepath.Join(ns, name, v.latest, diskName)
		}
	}
	return diskName // not reached: there is a point
}

// kernelVolume finds the volume to mount.
func kernelVolume(d *disk.Disk, name string) (*disk.Volume, error) {
	var have []string
	for _, v := range d.Volumes {
		if err := kernelRefuses(v, name); err != nil {
			return nil, err
		}
		if v.Name == name && (v.Partition != nil || d.Table == nil && name == "") {
			return v, nil
		}
		if v.Partition != nil {
			typ := v.Type
			if typ == "" {
				typ = "unknown"
			}
			have = append(have, fmt.Sprintf("%s (%s)", v.Name, typ))
		}
	}
	if len(have) == 0 && d.Table != nil {
		return nil, fmt.Errorf("this disk has %s", d.Table.Describe())
	}
	if name == "" {
		return nil, fmt.Errorf("this disk has partitions: name one of %s with --partition", strings.Join(have, ", "))
	}
	if len(have) == 0 {
		return nil, fmt.Errorf("there is no partition %s: the disk has none, leave --partition away", name)
	}
	return nil, fmt.Errorf("there is no partition %s: there are %s", name, strings.Join(have, ", "))
}

// kernelRefuses says why a volume that was asked for cannot be mounted through a loop device:
// logical volumes need the device mapper, and arrays, encrypted volumes and the like hold no
// file system that can be mounted by itself.
func kernelRefuses(v *disk.Volume, name string) error {
	if v.Name != name {
		return nil
	}
	logical := v.Partition == nil && v.Name != ""
	if v.Type != "LVM2_member" {
		if err := v.Unmountable(); err != nil || !logical {
			return err //nolint:wrapcheck // says what the volume is, and what to do
		}
	}
	what := "is a physical volume of LVM"
	if logical {
		what = "is a logical volume of LVM"
	}
	if name == "" {
		name = "the disk"
	}
	return fmt.Errorf("%s %s, which 'varve mount --kernel' does not activate: its files are read by 'varve mount', 'varve ls' and 'varve cp'; "+
		"for the kernel's driver attach the disk ('varve attach'), then 'vgchange -ay' and mount", name, what)
}

// Done is closed when nobody reads through the device any more: the tree below it
// is not mounted, or the kernel has let go of it.
func (m *KernelMounted) Done() <-chan struct{} {
	if m.device != nil {
		return m.device.Done
	}
	return m.tree.Done()
}

// Close unmounts, and takes away what is below; where programs have files open, they
// get errors from then on.
func (m *KernelMounted) Close() error {
	if m.device != nil {
		return m.closeDevice()
	}
	if m.tree == nil {
		return removeTree(m.Dir)
	}
	var err error
	select {
	case <-m.tree.Done(): // unmounted by others; the directory may have a mount of another process by now
	default:
		if m.aside != nil {
			err = m.aside.Unmount(m.Dir)
		} else {
			err = unmountKernel(m.Dir, true, m.by)
		}
	}
	return errors.Join(err, m.tree.Close(), removeTree(m.Dir))
}

// kernelTree is the directory of the tree under a kernel mount.
func kernelTree(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return filepath.Join(kernelState, "kernel-"+hex.EncodeToString(sum[:8]))
}

func removeTree(dir string) error {
	if err := os.Remove(kernelTree(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) { // busy: another's
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// IsKernelMount reports whether a kernel mount of ours, served or not, is at dir.
func IsKernelMount(dir string) bool {
	dir, err := absolute(dir)
	if err != nil {
		return false
	}
	_, err = os.Lstat(kernelTree(dir))
	return err == nil || dead(err)
}

// UnmountKernel unmounts what MountKernel mounted; its process ends by itself. by is as
// it was there, or any that can tell its devices. Errors: ErrBusy.
func UnmountKernel(dir string, lazy bool, by BlockDevices) error {
	dir, err := absolute(dir)
	if err != nil {
		return err
	}
	if err := unmountKernel(dir, lazy, by); err != nil {
		return err
	}
	return clearKernel(dir, by)
}

// clearKernel takes away what was below a mount: a tree, or a device.
func clearKernel(dir string, by BlockDevices) error {
	if err := Unmount(kernelTree(dir), true); err != nil && !errors.Is(err, ErrNotMounted) {
		return err
	}
	return errors.Join(detachDevice(dir, by), removeTree(dir))
}

// unmountKernel takes the kernel's mount away, and with it the device.
func unmountKernel(dir string, lazy bool, by BlockDevices) error {
	ours, err := loopsOver(kernelTree(dir))
	if err != nil {
		return err
	}
	if device, err := deviceOf(dir, by); err != nil {
		return err
	} else if device != "" {
		ours = append(ours, device)
	}
	source, err := mountSource(dir)
	if err != nil || !slices.Contains(ours, source) {
		return err
	}
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	switch err := unix.Unmount(dir, flags); {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%s: %w", dir, ErrBusy)
	case err != nil && !errors.Is(err, unix.EINVAL):
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// CleanKernel takes away what a killed process left of a mount at dir. A mount that
// is being served is an error.
func CleanKernel(dir string, by BlockDevices) error {
	dir, err := absolute(dir)
	if err != nil {
		return err
	}
	if !IsKernelMount(dir) {
		return nil // nothing of ours was ever here
	}
	tree := kernelTree(dir)
	served, err := isServed(dir)
	if err != nil {
		return err
	}
	typ, err := mountType(tree)
	if err != nil {
		return err
	}
	if typ == fsType {
		if _, err := os.Stat(tree); !dead(err) {
			served = true
		}
	}
	if served {
		return fmt.Errorf("a recovery point is mounted on %s already; unmount it first: varve umount %s", dir, dir)
	}
	if err := unmountKernel(dir, true, by); err != nil {
		return err
	}
	return clearKernel(dir, by)
}

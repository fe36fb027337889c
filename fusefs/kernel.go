package fusefs

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/blockdev"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// kernelState holds the trees below kernel mounts, one directory for each mounted directory.
const kernelState = "/run/varve"

// KernelMounted is a file system of one recovery point, mounted by the kernel.
type KernelMounted struct {
	Dir    string // absolute
	by     blockdev.Driver
	aside  Aside
	tree   *Mounted         // with a loop device
	device *blockdev.Device // otherwise
	handle handle           // of the point, without a tree
}

// MountKernel mounts a volume of the FS's only point read-only at dir, with the kernel's own
// driver: on a device made by by, or, if by is nil, on a loop device over disk.img in a
// separate tree. A journal is replayed into the overlay of the disk if necessary, so the FS
// must be writable. volume is a partition's name ("p1"), or empty on a disk without
// partitions.
//
// The device is removed with the mount, whatever unmounts it. What a killed process left at
// dir is removed first.
func (f *FS) MountKernel(dir, volume string, by blockdev.Driver) (m *KernelMounted, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("mounting with the kernel needs root; files can be read without by 'varve mount', 'varve ls' and 'varve cp'")
	}
	if f.opt.Point == nil || !f.opt.Writable {
		return nil, errors.New("mount with the kernel: needs one recovery point and an overlay")
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

// diskPath returns the path of disk.img of the FS's only point in the tree.
func (f *FS) diskPath() string {
	for ns, vols := range f.view.Load().namespaces {
		for name, v := range vols {
			return filepath.Join(ns, name, v.latest, diskName)
		}
	}
	return diskName // not reached: there is a point
}

// kernelVolume finds the volume to mount.
func kernelVolume(d *volumes.Disk, name string) (*volumes.Volume, error) {
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
		return nil, fmt.Errorf("there is no partition %s: the disk has none; leave out --partition", name)
	}
	return nil, fmt.Errorf("there is no partition %s: there are %s", name, strings.Join(have, ", "))
}

// kernelRefuses returns why the named volume cannot be mounted through a loop device: logical
// volumes need the device mapper, and arrays, encrypted volumes and the like hold no file
// system that can be mounted by itself.
func kernelRefuses(v *volumes.Volume, name string) error {
	if v.Name != name {
		return nil
	}
	logical := v.Partition == nil && v.Name != ""
	if v.Type != "LVM2_member" {
		if err := v.Unmountable(); err != nil || !logical {
			return err
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

// Done is closed when the device is no longer used: the tree below it is unmounted, or the
// kernel has released it.
func (m *KernelMounted) Done() <-chan struct{} {
	if m.device != nil {
		return m.device.Done
	}
	return m.tree.Done()
}

// Close unmounts, and removes what is below; programs with open files get errors from then
// on.
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

// kernelTree returns the directory of the tree below a kernel mount.
func kernelTree(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return filepath.Join(kernelState, "kernel-"+hex.EncodeToString(sum[:8]))
}

func removeTree(dir string) error {
	if err := os.Remove(kernelTree(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) { // busy: used by another process
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// IsKernelMount reports whether a kernel mount of Varve's, served or not, is at dir.
func IsKernelMount(dir string) bool {
	dir, err := absolute(dir)
	if err != nil {
		return false
	}
	_, err = os.Lstat(kernelTree(dir))
	return err == nil || dead(err)
}

// UnmountKernel unmounts what MountKernel mounted; that process then ends. by is the same, or
// any driver that knows its devices. Errors: ErrBusy.
func UnmountKernel(dir string, lazy bool, by blockdev.Driver) error {
	dir, err := absolute(dir)
	if err != nil {
		return err
	}
	if err := unmountKernel(dir, lazy, by); err != nil {
		return err
	}
	return clearKernel(dir, by)
}

// clearKernel removes what was below a mount: a tree, or a device.
func clearKernel(dir string, by blockdev.Driver) error {
	if err := Unmount(kernelTree(dir), true); err != nil && !errors.Is(err, ErrNotMounted) {
		return err
	}
	return errors.Join(detachDevice(dir, by), removeTree(dir))
}

// unmountKernel removes the kernel's mount, and with it the device.
func unmountKernel(dir string, lazy bool, by blockdev.Driver) error {
	ours, err := blockdev.LoopsOver(kernelTree(dir), diskName)
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

// CleanKernel removes what a killed process left of a mount at dir. It fails if the mount is
// being served.
func CleanKernel(dir string, by blockdev.Driver) error {
	dir, err := absolute(dir)
	if err != nil {
		return err
	}
	if !IsKernelMount(dir) {
		return nil // no mount of Varve's
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

package fusefs

import (
	"github.com/varve-io/varve/blockdev"
	"github.com/varve-io/varve/fusefs/diskfs/volumes"
)

// Aside runs in another process what makes the kernel send requests to this one through FUSE.
// A thread that waits for such a reply cannot be killed: if it belongs to the process that
// serves the replies, and that is killed, both stay for ever.
type Aside interface {
	// MountLoop calls the function of this name.
	MountLoop(image string, v blockdev.LoopVolume, dir string) error
	// Unmount calls UnmountKernel, lazily.
	Unmount(dir string) error
}

func loopVolume(v *volumes.Volume) blockdev.LoopVolume {
	start, length := v.Locate(0) // on a mirror, not the start of the partition
	return blockdev.LoopVolume{Type: v.Type, Start: start, Length: length}
}

// mountLoop calls MountLoop, in another process if possible.
func (f *FS) mountLoop(image string, v blockdev.LoopVolume, dir string) error {
	if f.opt.Aside != nil {
		return f.opt.Aside.MountLoop(image, v, dir)
	}
	return blockdev.MountLoop(image, v, dir)
}

// Package blockdev makes block devices of this machine's kernel from disks that this process
// serves, by the NBD driver (package nbdattach) or by a loop device over a file in a FUSE
// tree, and mounts them with the kernel.
package blockdev

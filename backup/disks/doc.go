// Package disks opens recovery points as disks. [Disks.Hold] is the only way to open a point:
// it shares one opened disk between its users, protects the point from prune by a lease (the
// [Rule] says when), and adds a layer for writes (package overlay) and a local copy (package
// hydrate).
//
// Reads go to [Disk.Image], or to a layer over it. Showing a disk, as an NBD export, a file
// or a block device, is the task of other packages.
package disks

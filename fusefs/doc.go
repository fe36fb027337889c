// Package fusefs shows the recovery points of a repository as a directory tree,
// through FUSE.
//
// # The tree
//
//	shop/                          a namespace
//	  db/                          a volume
//	    latest -> 2026-11-20T10:00:00Z
//	    2026-11-20T10:00:00Z/      a recovery point
//	      disk.img                 the whole disk
//	      info.json                what it is, and what reading it has cost so far
//	      files/                   the file system on the disk
//
// On a disk with partitions or logical volumes files/ holds one directory for
// each (files/p1, files/vg/root). Where a file system cannot be read, its
// directory holds one file, ERROR.txt, that says why and what to do.
//
// # Structure
//
// [New] makes an [FS] of a repository, [FS.Mount] attaches it to a directory.
// The upper directories (dirs.go) are made up from the catalogue, which a
// goroutine of the FS reads again from time to time: new points appear, deleted
// ones go. A point (point.go) is opened by the first use of its disk or files and
// stays so. disk.img (diskimg.go) serves an image or an overlay over it; files/
// (files.go, inode.go) serves diskfs.Inodes by their numbers, without paths. Each
// node type implements just the capabilities it has, asserted beside it.
//
// # Caching
//
// Recovery points never change, so what is below one is cached by the kernel for
// an hour of attributes and names, and without end of content (FOPEN_KEEP_CACHE).
// The directories above are cached for a second. Decoded blocks are shared by all
// points, within the size given in Options.
//
// # Inode numbers
//
// They follow the recovery point, the volume and the file's own number, so they
// are the same after the next mount (numbers.go).
//
// # Errors
//
// What a program sees is an errno: EUCLEAN for a damaged file system, EOPNOTSUPP
// for one that needs what the reader does not have, EIO for blocks that cannot be
// read. The reason goes to the log.
//
// # Leases
//
// While files of a point are open, and for some time after, the point has a
// lease: prune leaves it alone. Of a read-only repository there is none.
package fusefs

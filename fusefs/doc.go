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
//	      stream                   instead of disk.img, for a point of a stream
//	      info.json                its description, and what was fetched for it so far
//	      files/                   the file system on the disk
//
// On a disk with partitions or logical volumes files/ holds one directory for
// each (files/p1, files/vg/root). If a file system cannot be read, its directory
// holds one file, ERROR.txt, that says why and what to do.
//
// # Structure
//
// [New] makes an [FS] of a repository, [FS.Mount] attaches it to a directory.
// The upper directories (dirs.go) are virtual: they show the catalogue, which a
// goroutine of the FS refreshes, so that new points appear and deleted ones
// disappear. A point (point.go) is opened by the first use of its disk or files
// and stays open. disk.img (diskimg.go) serves an image or an overlay over it;
// files/ (files.go, inode.go) serves diskfs.Inodes by their numbers, without
// paths. Each node type implements only the capabilities it has, asserted beside it.
//
// # Caching
//
// Recovery points never change, so the kernel caches attributes and names below
// one for an hour, and content without limit (FOPEN_KEEP_CACHE). It caches the
// directories above for a second. All points share the decoded blocks, up to the
// size given in Options.
//
// # Inode numbers
//
// They derive from the recovery point, the volume and the file's own number, so
// they are the same after the next mount (numbers.go).
//
// # Errors
//
// Programs get an errno: EUCLEAN for a damaged file system, EOPNOTSUPP for a
// feature that the reader does not support, EIO for blocks that cannot be read and
// for a panic of a reader.
// The reason goes to the log.
//
// # Leases
//
// While files of a point are open, and for some time after, the point has a lease:
// prune keeps it. In a read-only repository there is no lease.
package fusefs

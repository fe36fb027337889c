// Package points lists the recovery points of a repository, resolves their names, and keeps
// the records beside them: leases and quarantines. A recovery point is a Kopia snapshot of
// one disk image and its record; package blocktree has the format. Package disks opens a
// point, package backup makes and deletes points.
package points

// Package serve serves the recovery points of a repository to NBD clients: a live catalogue
// of exports over package disks.
//
// [Catalog] follows the repository and names the points; it is an nbdserver.Resolver. A point
// is opened with its first connection and stays open for a while after its last. While it is
// open a lease in the repository protects it from prune. With [Options.Writable] it has an
// overlay, shared by all connections, until the server ends.
package serve

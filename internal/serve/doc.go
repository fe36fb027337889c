// Package serve gives the recovery points of a repository to NBD clients: a
// live catalogue of exports over backup, image and overlay.
//
// [Catalog] follows the repository and names the points; it is an
// nbdserver.Resolver. A point is opened with its first connection and stays
// open a while after its last. While it is open a lease in the repository
// keeps it from being pruned. With [Options.Writable] an overlay lies over it,
// one for all connections, until the server ends.
package serve

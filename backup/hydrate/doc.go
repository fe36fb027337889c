// Package hydrate keeps local copies of images that grow as they are read: what was decoded
// once is later read from a sparse file, through the page cache. Whole images are fetched in
// the background, while readers go first. How an image is presented is the task of other
// packages.
//
// A [Cache] is a directory with one subdirectory for each image:
//
//	data   sparse, as long as the image; a unit lies at its offset
//	map    a log that says which units are in data, with their checksums, and
//	       which are zero
//
// The unit is a power of two, best the block size of the image, so that a decoded block is
// written once and whole.
//
// # Crashes and damage
//
// The map lists a unit only after its bytes were synced, so that neither a killed process nor
// a crashed machine leaves a unit that was never written. A copy is bound to the identity and
// the size of its image, and what an earlier process left is compared with its checksum
// before its first use. A copy is never needed: after any failure the bytes come from the
// image.
//
// # Space
//
// A cache has a limit. At the limit, or when the file system is full, copies that are not
// open are deleted, the least recently used first; after that nothing more is kept, the log
// says so once, and reads continue from the image.
//
// # Concurrency
//
// All methods are safe for concurrent use. A disk must not be read after it is closed, and
// disks are closed before their cache.
package hydrate

import "context"

// Source is the image of a copy. Its methods are called concurrently.
type Source interface {
	// Size is the image's length in bytes; it never changes.
	Size() int64
	// ReadAt fills p from off, both within Size, or returns an error and how
	// many leading bytes are valid.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	// Extents reports the runs of a range in order and without gaps, until yield returns
	// false; the last may extend beyond the range.
	Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error
}

// OnceReader is a Source that can read without its own caches. Hydration uses it, since the
// file caches what it reads.
type OnceReader interface {
	// ReadOnce fills p from off, both within Size.
	ReadOnce(ctx context.Context, p []byte, off int64) error
}

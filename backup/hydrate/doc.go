// Package hydrate keeps local copies of images that grow as they are read: what
// was decoded once is read from a sparse file, through the page cache, from
// then on. In the background whole images arrive, while readers go first. It
// knows nothing of how an image is presented.
//
// A [Cache] is a directory with one subdirectory for each image:
//
//	data   sparse, as long as the image; a unit lies at its offset
//	map    a log that says which units are in data, with their checksums, and
//	       which are zero
//
// The unit is a power of two, best the block size of the image, so that a
// decoded block is written once and whole.
//
// # Crashes and damage
//
// The map tells of a unit only after its bytes were synced, so that neither a
// killed process nor a crashed machine leaves a unit that was never written. A
// copy is bound to the identity and the size of its image, and what an earlier
// process left is compared with its checksum before it is first used. A copy
// is never needed: whatever fails here, the bytes come from the image.
//
// # Space
//
// A cache has a limit. At the limit, or when the file system is full, the
// copies that nobody has open go, the longest unused first; then nothing more
// is kept, a line in the log says so, and reads go on from the image.
//
// # Concurrency
//
// All methods may be called from many goroutines. A disk must not be read any
// more when it is closed, and disks are closed before their cache.
package hydrate

import "context"

// Source is the image that a copy is of. Its methods are called from many
// goroutines at once.
type Source interface {
	// Size is the image's length in bytes; it never changes.
	Size() int64
	// ReadAt fills p from off, both within Size, or returns an error and how
	// many leading bytes are valid.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	// Extents tells the runs of a range in order and without gaps, until
	// yield returns false; the last may reach beyond the range.
	Extents(ctx context.Context, off, length int64, yield func(length int64, hole, zero bool) bool) error
}

// OnceReader is a Source that can read past caches of its own. Hydration uses
// it: what it reads is in the file then.
type OnceReader interface {
	// ReadOnce fills p from off, both within Size.
	ReadOnce(ctx context.Context, p []byte, off int64) error
}

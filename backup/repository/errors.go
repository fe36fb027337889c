package repository

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/kopia/kopia/repo/blob"
)

// isCorrupt recognises what Kopia answers for bytes that do not decode. It has
// no sentinel for them (kopia repo/content/committed_read_manager.go,
// decryptContentAndVerify), so the fixed parts of its messages are matched.
func isCorrupt(err error) bool {
	if errors.Is(err, blob.ErrInvalidRange) { // the pack is shorter than its index says
		return true
	}
	for _, text := range []string{
		"invalid checksum",
		"error decompressing",
		"unsupported compressor",
		"unable to decrypt",
		"malformed content",
		"invalid length", // a short pack on a file system (kopia repo/blob/filesystem)
	} {
		if strings.Contains(err.Error(), text) {
			return true
		}
	}
	return false
}

// ErrStorageFull means that the storage has no room for what was to be written.
// What was flushed before stays; nothing is left half-written.
var ErrStorageFull = errors.New("the repository's storage is full")

// explainWrite tells what to do about storage without room. Deleting points and
// maintenance write a little, too (less than 1 MiB in a small repository, more where
// indexes are long), so some room has to be made from outside first.
func explainWrite(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: free a few MiB of it by other means than varve, which writes a little even to delete, or enlarge it, "+
			"and run this again; every older recovery point is intact: %w", ErrStorageFull, err)
	}
	return err
}

package repository

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/kopia/kopia/repo/blob"
)

// isCorrupt recognises Kopia's errors about bytes that do not decode. Kopia has no
// sentinel for them (kopia repo/content/committed_read_manager.go,
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

// ErrStorageFull means that the storage has no room for a write. Flushed data is kept;
// nothing is left half-written.
var ErrStorageFull = errors.New("the repository's storage is full")

// explainWrite says what to do about full storage. Deleting points and maintenance also
// write a little (less than 1 MiB in a small repository, more where indexes are long), so
// some room must first be made from outside.
func explainWrite(err error) error {
	var denied *deniedError
	if errors.As(err, &denied) { // Kopia's way there says nothing to the user
		return denied
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: enlarge it, or free a few MiB without varve, which must write even to delete, "+
			"and run this again; older recovery points are intact: %w", ErrStorageFull, err)
	}
	return err
}

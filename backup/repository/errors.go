package repository

import (
	"errors"
	"strings"

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
	} {
		if strings.Contains(err.Error(), text) {
			return true
		}
	}
	return false
}

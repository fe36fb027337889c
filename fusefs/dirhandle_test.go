package fusefs

import (
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Listing a directory does not make a node for every entry: the process would hold all of
// them.
func TestListingMakesFewNodes(t *testing.T) {
	h := &dirHandle{off: maxAhead + 1}
	var out fuse.EntryOut
	if n, errno := h.Lookup(t.Context(), "name", &out); n != nil || errno == 0 || out.NodeId != 0 {
		t.Errorf("entry %d has the node %v", h.off, n)
	}
}

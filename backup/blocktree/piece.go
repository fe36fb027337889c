package blocktree

import (
	"bytes"

	"github.com/varve-io/varve/backup/repository"
)

// PieceObjects returns the objects that an index names, or a piece that a large
// index was cut into at an entry's boundary, in order. ok is false for anything
// else; a foreign index that was cut anywhere has to be put together first.
func PieceObjects(p []byte) (objects []repository.ObjectID, ok bool) {
	body, first := cut(p, indexHead)
	if !first {
		body, _ = cut(body, entrySep)
	}
	body, _ = bytes.CutSuffix(body, []byte(indexTail))
	entries, ok := parseEntries(body)
	if !ok || len(entries) == 0 {
		var err error
		if entries, err = parseJSON(p); err != nil {
			return nil, false
		}
	}
	objects = make([]repository.ObjectID, len(entries))
	for i := range entries {
		objects[i] = entries[i].Object
	}
	return objects, true
}

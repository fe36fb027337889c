package blocktree

import (
	"bytes"

	"github.com/varve-io/varve/backup/repository"
)

// PieceObjects returns the objects in an index, or in a piece of a large index that was cut
// between entries, in order. ok is false for anything else; a foreign index cut elsewhere
// must be joined first.
func PieceObjects(p []byte) (objects []repository.ObjectID, ok bool) {
	body, first := cut(p, indexHead)
	if !first {
		body, _ = cut(body, entrySep)
	}
	body, _ = bytes.CutSuffix(body, []byte(indexTail))
	objects = make([]repository.ObjectID, 0, len(body)/64+1)
	if eachEntry(body, func(e *Entry) { objects = append(objects, e.Object) }) && len(objects) > 0 {
		return objects, true
	}
	entries, err := parseJSON(p)
	if err != nil {
		return nil, false
	}
	objects = objects[:0]
	for i := range entries {
		objects = append(objects, entries[i].Object)
	}
	return objects, true
}

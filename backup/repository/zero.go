package repository

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"

	"github.com/kopia/kopia/repo/content"
)

var errNoHash = errors.New("repository's hash is out of reach")

// zeroIDs remembers the IDs of contents of zeroes by length.
type zeroIDs struct {
	mu   sync.Mutex
	byID map[int64]ObjectID
}

// ZeroID returns the ID that a direct object of n zero bytes has in this repository:
// contents are keyed per repository, and Kopia has no holes, so a reader recognises one
// by this ID. Nothing is read or written.
func (r *Repository) ZeroID(_ context.Context, n int64) (ObjectID, error) {
	if n < 0 || n > MaxContentSize {
		return ObjectID{}, fmt.Errorf("zero object of %d bytes", n)
	}
	r.zero.mu.Lock()
	defer r.zero.mu.Unlock()
	if oid, ok := r.zero.byID[n]; ok {
		return oid, nil
	}
	oid, err := r.hashObject("", make([]byte, n))
	if err != nil {
		return ObjectID{}, err
	}
	if r.zero.byID == nil {
		r.zero.byID = map[int64]ObjectID{}
	}
	if len(r.zero.byID) < 4096 { // variable-length objects may need any length
		r.zero.byID[n] = oid
	}
	return oid, nil
}

// hashObject computes the ID that p would get under prefix. Kopia's hash
// function takes gather.Bytes, a type of an internal package with one exported field, so
// the argument is built by reflection. That is cheap enough for the few IDs needed, and a
// change of the type is an error, not a wrong ID.
func (r *Repository) hashObject(prefix content.IDPrefix, p []byte) (ObjectID, error) {
	if r.direct == nil {
		return ObjectID{}, fmt.Errorf("%w through a Kopia API server", errNoHash)
	}
	hash := reflect.ValueOf(r.direct.ContentReader().ContentFormat().HashFunc())
	t := hash.Type()
	if t.Kind() != reflect.Func || t.NumIn() != 2 || t.NumOut() != 1 || t.In(1).Kind() != reflect.Struct {
		return ObjectID{}, fmt.Errorf("%w: hash function is %v", errNoHash, t)
	}
	arg := reflect.New(t.In(1)).Elem()
	slices := arg.FieldByName("Slices")
	if !slices.IsValid() || !slices.CanSet() || slices.Type() != reflect.TypeFor[[][]byte]() {
		return ObjectID{}, fmt.Errorf("%w: hash argument is %v", errNoHash, t.In(1))
	}
	slices.Set(reflect.ValueOf([][]byte{p}))
	sum, ok := hash.Call([]reflect.Value{reflect.ValueOf([]byte(nil)), arg})[0].Interface().([]byte)
	if !ok {
		return ObjectID{}, fmt.Errorf("%w: hash result is %v", errNoHash, t.Out(0))
	}
	cid, err := content.IDFromHash(prefix, sum)
	if err != nil {
		return ObjectID{}, fmt.Errorf("hash object: %w", err)
	}
	return directID(cid), nil
}

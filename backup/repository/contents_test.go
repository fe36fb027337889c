package repository_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
)

// TestContentsAreObjects: an object written without the object writer equals the one it
// would have written, and reads back.
func TestContentsAreObjects(t *testing.T) {
	r := repotest.New(t).Open(t)
	random := make([]byte, 300<<10)
	_, _ = rand.NewChaCha8([32]byte{5}).Read(random)
	blocks := [][]byte{{7}, random[:4096], random, bytes.Repeat([]byte("compresses well "), 8<<10), make([]byte, repository.MaxContentSize)}
	var ids [2][]repository.ObjectID
	var uploaded [2]int64
	for i, objects := range []bool{true, false} {
		w, err := r.NewWriter(t.Context(), "test")
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if objects && !w.WriteObjects() {
			t.Error("contents are not written directly")
		}
		for _, b := range blocks {
			p := bytes.Clone(b)
			for _, write := range []func() (repository.ObjectID, error){
				func() (repository.ObjectID, error) { return w.WriteBlock(t.Context(), p) },
				func() (repository.ObjectID, error) { return w.WriteIndex(t.Context(), p) },
			} {
				id, err := write()
				if err != nil {
					t.Fatal(err)
				}
				ids[i] = append(ids[i], id)
			}
			clear(p) // it may be used for something else
		}
		if !objects {
			if err := w.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		uploaded[i] = w.Uploaded()
	}
	if fmt.Sprint(ids[0]) != fmt.Sprint(ids[1]) {
		t.Errorf("objects %v, contents %v", ids[0], ids[1])
	}
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, id := range ids[1] {
		if b, err := r.ReadObject(t.Context(), id); err != nil || !bytes.Equal(b, blocks[i/2]) {
			t.Errorf("%v reads other bytes, or %v", id, err)
		}
	}
	if most := int64(400 << 10); uploaded[1] > 2*most {
		t.Errorf("%d bytes were uploaded: nothing was compressed", uploaded[1])
	}
}

// BenchmarkWriteBlock writes blocks of 128 KiB, new and known ones.
func BenchmarkWriteBlock(b *testing.B) {
	for _, known := range []bool{false, true} {
		for _, objects := range []bool{true, false} {
			b.Run(fmt.Sprintf("known=%v/objects=%v", known, objects), func(b *testing.B) {
				r := repotest.New(b).Open(b)
				w, err := r.NewWriter(b.Context(), "test")
				if err != nil {
					b.Fatal(err)
				}
				defer w.Close()
				if objects {
					w.WriteObjects()
				}
				p := make([]byte, 128<<10)
				_, _ = rand.NewChaCha8([32]byte{5}).Read(p)
				b.SetBytes(int64(len(p)))
				b.ReportAllocs()
				for i := range b.N {
					if !known {
						p[0], p[1], p[2] = byte(i), byte(i>>8), byte(i>>16)
					}
					if _, err := w.WriteBlock(b.Context(), p); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

package nbddisk_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// restarted is a server that is another one from a moment on.
type restarted struct {
	before, after nbdserver.Opened
	now           atomic.Bool
}

func (r *restarted) List(context.Context, nbdserver.Client, func(nbdserver.Listing) bool) error {
	return nil
}

func (r *restarted) Open(_ context.Context, name string, _ nbdserver.Client) (*nbdserver.Opened, error) {
	o := r.before
	if r.now.Load() {
		o = r.after
	}
	if o.Name == "" {
		o.Name = name
	}
	return &o, nil
}

func withBitmap(content []byte, dirty func(block int64) uint32) *nbdtest.Disk {
	d := nbdtest.NewDisk(content)
	d.Extra = map[string]func(int64) uint32{bitmap: dirty}
	return d
}

// TestReconnectToAnotherMoment has a server that is started again while it is read, with a disk of
// the same size: what is read then is the same disk, or an error; never bytes of two moments, and
// never a change that is left out.
func TestReconnectToAnotherMoment(t *testing.T) {
	t.Parallel()
	monday := content(striped)
	tuesday := bytes.Clone(monday)
	for off := 0; off < diskSize; off += 8 << 10 { // half of all blocks: no sample misses it
		tuesday[off+1300] ^= 0xff
	}
	dirty := func(block int64) uint32 { return uint32(block / 8 % 2) }
	disk := withBitmap(monday, dirty)
	for name, c := range map[string]struct {
		after nbdserver.Opened
		want  string // of the error; empty for none
	}{
		"the same":                  {nbdserver.Opened{Export: withBitmap(monday, dirty).ReadOnly()}, ""},
		"the next day":              {nbdserver.Opened{Export: withBitmap(tuesday, dirty).ReadOnly()}, "another moment"},
		"a bitmap that was renewed": {nbdserver.Opened{Export: withBitmap(monday, func(int64) uint32 { return 0 }).ReadOnly()}, "another moment"},
		"without its bitmap":        {nbdserver.Opened{Export: nbdtest.NewDisk(monday).ReadOnly()}, "no such dirty bitmap"},
		"another description":       {nbdserver.Opened{Export: withBitmap(monday, dirty).ReadOnly(), Description: "tuesday"}, `"tuesday"`},
		"another name":              {nbdserver.Opened{Export: withBitmap(monday, dirty).ReadOnly(), Name: "vdb"}, `"vdb"`},
		"writable":                  {nbdserver.Opened{Export: withBitmap(monday, dirty).Writable()}, "other operations"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := &restarted{before: nbdserver.Opened{Export: disk.ReadOnly()}, after: c.after}
			uri, cut := serveCatalog(t, r)
			d := open(t, uri, nbddisk.Options{Bitmaps: []string{"b"}, Retry: time.Minute})
			src := &nbddisk.Bitmap{Disk: d, Name: "b", Base: "sunday", Kind: "bitmap"}
			req := cbt.Request{Size: d.Size(), Base: &cbt.Base{ChangeID: "sunday", Size: d.Size()}}
			if _, err := src.Changes(t.Context(), req, func(cbt.Extent) error { return nil }); err != nil {
				t.Fatal(err)
			}
			if _, err := d.ReadAt(make([]byte, diskSize/2), 0); err != nil {
				t.Fatal(err)
			}
			r.now.Store(true)
			cut.cut(false)
			got := make([]byte, diskSize)
			_, err := d.ReadAt(got, 0)
			if err == nil { // none of a few samples was another
				err = d.Verify()
			}
			if c.want == "" {
				if err != nil || !bytes.Equal(got, monday) {
					t.Errorf("the same disk: %v, or other bytes", err)
				}
				return
			}
			if !errors.Is(err, nbddisk.ErrOtherDisk) && !errors.Is(err, nbddisk.ErrNoBitmap) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want an error with %q: %v", c.want, err)
			}
			// Nor is a listing completed by it.
			if _, err := src.Changes(t.Context(), req, func(cbt.Extent) error { return nil }); err == nil && d.Verify() == nil {
				t.Error("the changes were listed")
			}
		})
	}
}

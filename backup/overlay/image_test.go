package overlay

import (
	"bytes"
	"context"
	"testing"
	"time"
)

// soon waits for what must not wait for the image.
func soon(t *testing.T, what string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	case <-time.After(time.Minute):
		t.Fatalf("%s waits", what)
	}
}

// panicking is a base that panics.
type panicking struct{ memory }

func (panicking) ReadAt(context.Context, []byte, int64) (int, error) { panic("the image") }

// A panic of the image below leaves nothing locked, and takes no space.
func TestPanicOfTheImage(t *testing.T) {
	ctx := t.Context()
	o := open(t, panicking{newBase(1 << 20)}, Options{})
	for name, change := range map[string]func() error{
		"write": func() error { _, err := o.WriteAt(ctx, []byte{1}, 100); return err },
		"zero":  func() error { return o.Zero(ctx, 100, 1, true, false) },
	} {
		soon(t, name, func() error {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			return change()
		})
		if o.Used() != 0 {
			t.Errorf("%s: %d bytes are used", name, o.Used())
		}
	}
	p := bytes.Repeat([]byte{7}, Granule)
	soon(t, "a write elsewhere", func() error { _, err := o.WriteAt(ctx, p, 8*Granule); return err })
	got := make([]byte, Granule)
	soon(t, "a read of it", func() error { _, err := o.ReadAt(ctx, got, 8*Granule); return err })
	if !bytes.Equal(got, p) || o.Used() != Granule {
		t.Errorf("the granule holds %d, and %d bytes are used", got[0], o.Used())
	}
}

// A write that waits for the image does not hold up reads of what is in the overlay.
func TestReadsBesideAWaitingWrite(t *testing.T) {
	ctx := t.Context()
	base := slow{newBase(1 << 20), make(chan struct{}, 1), make(chan struct{})}
	o := open(t, base, Options{})
	p := bytes.Repeat([]byte{7}, Granule)
	if _, err := o.WriteAt(ctx, p, 0); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		_, err := o.WriteAt(ctx, []byte{1}, 8*Granule+100)
		written <- err
	}()
	<-base.entered
	defer func() {
		close(base.open)
		if err := <-written; err != nil {
			t.Error(err)
		}
	}()
	got := make([]byte, Granule)
	soon(t, "a read", func() error { _, err := o.ReadAt(ctx, got, 0); return err })
	if !bytes.Equal(got, p) {
		t.Error("other bytes")
	}
	soon(t, "a look", func() error {
		if o.Unchanged(0, Granule) || !o.Unchanged(8*Granule, Granule) {
			t.Error("the wrong granules are unchanged")
		}
		return nil
	})
}

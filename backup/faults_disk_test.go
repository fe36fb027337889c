package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
)

// badDisk is a disk of which some sectors of 512 bytes cannot be read.
type badDisk struct {
	memDisk
	bad []blocktree.Range // in order
}

type badSector struct{ off int64 }

func (e *badSector) Error() string                    { return fmt.Sprintf("sector at offset %d: %v", e.off, syscall.EIO) }
func (e *badSector) Unwrap() error                    { return syscall.EIO }
func (e *badSector) BadRange() (offset, length int64) { return e.off, 512 }

func (d *badDisk) ReadAt(p []byte, off int64) (int, error) {
	for _, r := range d.bad {
		if r.Offset < off+int64(len(p)) && off < r.Offset+r.Length {
			at := max(r.Offset, off/512*512)
			n, _ := d.memDisk.ReadAt(p[:max(0, at-off)], off)
			return n, &badSector{at}
		}
	}
	return d.memDisk.ReadAt(p, off)
}

// TestBadSectors reads a disk with bad sectors: the run fails with the offset, or
// stores zeroes for exactly the sectors that are bad and says which.
func TestBadSectors(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	first := mustList(t, s.clean).Points()
	disk := &badDisk{memDisk{data: s.data}, []blocktree.Range{
		{Offset: 0, Length: 512}, {Offset: 65536 - 512, Length: 1024}, {Offset: 700 * 512, Length: 512 * 3}, {Offset: 1 << 20, Length: 777},
	}}
	opt := s.options()
	opt.Disk = disk
	for i, r := range disk.bad {
		opt.Disk = &badDisk{memDisk{data: s.data}, disk.bad[i : i+1]}
		_, _, err := Run(t.Context(), s.clean, opt)
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), fmt.Sprintf("offset %d", r.Offset)) {
			t.Errorf("bad from %d: %v", r.Offset, err)
		}
	}
	s.check()
	opt.Disk, opt.OnReadError = disk, ZeroOnReadError
	want := bytes.Clone(s.data)
	for _, r := range disk.bad {
		clear(want[r.Offset : r.Offset+r.Length])
	}
	p, rec, err := Run(t.Context(), s.clean, opt)
	if err != nil {
		t.Fatal(err)
	}
	s.want[p.ID] = want
	if !slices.Equal(rec.ReadErrors, disk.bad) {
		t.Errorf("recorded %v, want %v", rec.ReadErrors, disk.bad)
	}
	s.check()
	// Once the sectors can be read the next increment has their bytes.
	opt.Disk, opt.OnReadError = &memDisk{data: s.data}, FailOnReadError
	if p, rec, err = Run(t.Context(), s.clean, opt); err != nil || len(rec.ReadErrors) != 0 || p.Generation != first[1].Generation+2 {
		t.Fatalf("%+v, %v", rec, err)
	}
	s.want[p.ID] = s.data
	s.check()
}

// TestUnreadIsReadAgain: increments read what could not be read for their parent, although no
// source reports it as changed.
func TestUnreadIsReadAgain(t *testing.T) {
	t.Parallel()
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(8, 8)), 1<<20)
	bad := []blocktree.Range{{Offset: 700 * 512, Length: 512 * 3}, {Offset: 1<<20 - 1024, Length: 1024}}
	zeroed := bytes.Clone(data)
	for _, b := range bad {
		clear(zeroed[b.Offset : b.Offset+b.Length])
	}
	for _, tc := range []struct {
		name string
		disk Disk
		on   ReadErrorPolicy
		want []byte
		left []blocktree.Range
	}{
		{"can be read now", &memDisk{data: data}, FailOnReadError, data, nil},
		{"half of it", &badDisk{memDisk{data: data}, bad[:1]}, ZeroOnReadError, append(bytes.Clone(zeroed[:1<<19]), data[1<<19:]...), bad[:1]},
		{"still not", &badDisk{memDisk{data: data}, bad}, ZeroOnReadError, zeroed, bad},
		{"no disk", NoDisk(1 << 20), FailOnReadError, zeroed, bad},
		{"shrunk", &memDisk{data: data[:1<<20-512]}, FailOnReadError, data[:1<<20-512], nil},
	} {
		v := points.Volume{Namespace: "unread", Name: strings.ReplaceAll(tc.name, " ", "-"), Cluster: "test"}
		full, rec := mustBackup(t, r, Options{Volume: v, Disk: &badDisk{memDisk{data: data}, bad}, OnReadError: ZeroOnReadError, BlockSize: 64 << 10})
		if full.Unread != 2560 || !slices.Equal(rec.ReadErrors, bad) {
			t.Fatalf("the full: %d bytes unread, %v", full.Unread, rec.ReadErrors)
		}
		p, rec := mustBackup(t, r, Options{Volume: v, Disk: tc.disk, OnReadError: tc.on, Source: listSource{}, AllowShrink: true})
		if !slices.Equal(rec.ReadErrors, tc.left) || p.Kind != blocktree.KindIncremental {
			t.Errorf("%s: %s, unread are %v, want %v", tc.name, p.Kind, rec.ReadErrors, tc.left)
		}
		listed := mustList(t, r).ByID(p.ID)
		if listed.Unread != p.Unread || (listed.Unread > 0) != (len(tc.left) > 0) {
			t.Errorf("%s: listed with %d bytes unread, made with %d", tc.name, listed.Unread, p.Unread)
		}
		if !bytes.Equal(readPoint(t, r, p), tc.want) {
			t.Errorf("%s: reads back different", tc.name)
		}
	}
}

// What cannot be read is listed as few ranges, however many sectors it is.
func TestRangeList(t *testing.T) {
	t.Parallel()
	var l rangeList
	order := rand.New(rand.NewPCG(9, 9)).Perm(1000)
	for _, i := range order {
		if i != 500 {
			l.add(int64(i)*512, 512)
		}
	}
	l.add(100, 1000) // again
	if want := []blocktree.Range{{Length: 500 * 512}, {Offset: 501 * 512, Length: 499 * 512}}; !slices.Equal(l.ranges, want) {
		t.Errorf("%v", l.ranges)
	}
	var scattered rangeList
	size := int64(64<<20 - 100)
	for off := int64(0); off < size-512; off += 1024 {
		scattered.add(off, 512)
	}
	got := scattered.atMost(100, 128<<10, size)
	if len(got) > 100 || got[0].Offset != 0 {
		t.Errorf("%d ranges, the first %v", len(got), got[0])
	}
	for i, b := range scattered.ranges {
		if !slices.ContainsFunc(got, func(r blocktree.Range) bool { return r.Offset <= b.Offset && b.Offset+b.Length <= r.Offset+r.Length }) {
			t.Fatalf("range %d, %v, is not covered", i, b)
		}
	}
	for _, r := range got {
		if r.Offset+r.Length > size {
			t.Errorf("%v ends behind the disk", r)
		}
	}
	if again := scattered.atMost(len(scattered.ranges), 128<<10, size); !slices.Equal(again, scattered.ranges) {
		t.Error("ranges that are few enough are changed")
	}
}

// changingDisk changes its size while it is read.
type changingDisk struct {
	memDisk
	size   int64 // at opening
	change func(d *memDisk)
}

func (d *changingDisk) Size() int64 { return d.size }

func (d *changingDisk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.memDisk.ReadAt(p, off)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.change != nil {
		d.change(&d.memDisk)
		d.change = nil
	}
	return n, err
}

var errResized = errors.New("the disk changed its size")

func (d *changingDisk) CheckSize() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if int64(len(d.data)) != d.size {
		return errResized
	}
	return nil
}

// TestDiskChangesSize grows and shrinks the disk while it is backed up: no point is made.
func TestDiskChangesSize(t *testing.T) {
	t.Parallel()
	s := newFaultSite(t)
	for _, row := range []struct {
		name   string
		change func(d *memDisk)
		want   []string
	}{
		{"grows", func(d *memDisk) { d.data = append(bytes.Clone(d.data), 1, 2, 3) }, []string{errResized.Error()}},
		{"shrinks by a byte", func(d *memDisk) { d.data = d.data[:len(d.data)-1] }, []string{errResized.Error(), "did it shrink?"}},
		{"shrinks to nothing", func(d *memDisk) { d.data = nil }, []string{errResized.Error(), "did it shrink?"}},
	} {
		opt := s.options()
		opt.Disk = &changingDisk{memDisk{data: s.data}, int64(len(s.data)), row.change}
		_, _, err := Run(t.Context(), s.clean, opt)
		if err == nil || !slices.ContainsFunc(row.want, func(text string) bool { return strings.Contains(err.Error(), text) }) {
			t.Errorf("%s: %v", row.name, err)
		}
		s.check()
	}
	s.backup(s.clean)
	s.check()
}

// TestNoPointOfAMomentThatPassed: if the source finds that the bytes read are not of one
// moment, no point is made, and the next backup starts from the previous one.
func TestNoPointOfAMomentThatPassed(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(1, 2)), 300_000)
	first, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: data}})
	passed := errors.New("the job of the storage has ended")
	changed := bytes.Clone(data)
	changed[100_000]++
	_, _, err := Run(t.Context(), r, Options{Volume: testVolume, Disk: &memDisk{data: changed}, Check: func(context.Context) error { return passed }})
	if !errors.Is(err, passed) || !strings.Contains(err.Error(), "no point was made") {
		t.Errorf("the backup ended with %v", err)
	}
	if pts := mustList(t, r).Points(); len(pts) != 1 || pts[0].ID != first.ID {
		t.Errorf("%d points", len(pts))
	}
	asked := false
	p, _ := mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: changed}, Check: func(context.Context) error {
		asked = true
		return nil
	}})
	if !asked || p.Parent != first.ID || !bytes.Equal(readPoint(t, r, p), changed) {
		t.Errorf("asked %v, parent %s", asked, p.Parent)
	}
}

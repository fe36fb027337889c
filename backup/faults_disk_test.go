package backup

import (
	"bytes"
	"errors"
	"fmt"

	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/varve-io/varve/backup/blocktree"
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
	var got []blocktree.Range
	slices.SortFunc(rec.ReadErrors, func(a, b blocktree.Range) int { return int(a.Offset - b.Offset) })
	for _, r := range rec.ReadErrors { // of neighbouring sectors, or of two jobs
		if n := len(got); n > 0 && got[n-1].Offset+got[n-1].Length == r.Offset {
			got[n-1].Length += r.Length
			continue
		}
		got = append(got, r)
	}
	if !slices.Equal(got, disk.bad) {
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

// changingDisk changes its size while it is read.
type changingDisk struct {
	memDisk
	size   int64 // as it was when it was opened
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

// TestDiskChangesSize has the disk grow and shrink while it is backed up: no
// point is made of it.
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

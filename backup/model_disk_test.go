package backup

import (
	"bytes"
	"io"
	"maps"
	"slices"
)

const pageSize = 4096

// pageDisk is a sparse disk in memory. Pages are never changed once shared, so
// a copy costs a map.
type pageDisk struct {
	size  int64
	pages map[int64][]byte
}

func (d *pageDisk) clone() *pageDisk { return &pageDisk{size: d.size, pages: maps.Clone(d.pages)} }

func (d *pageDisk) Size() int64      { return d.size }
func (d *pageDisk) CheckSize() error { return nil }

func (d *pageDisk) ReadAt(p []byte, off int64) (int, error) {
	if off >= d.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), d.size-off))
	for done := 0; done < n; {
		at := off + int64(done)
		within := at % pageSize
		k := min(n-done, int(pageSize-within))
		if page, ok := d.pages[at/pageSize]; ok {
			copy(p[done:done+k], page[within:])
		} else {
			clear(p[done : done+k])
		}
		done += k
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// write changes [off, off+len(p)).
func (d *pageDisk) write(p []byte, off int64) {
	for len(p) > 0 {
		page := make([]byte, pageSize)
		copy(page, d.pages[off/pageSize])
		k := copy(page[off%pageSize:], p)
		d.pages[off/pageSize] = page
		p, off = p[k:], off+int64(k)
	}
}

func (d *pageDisk) resize(size int64) {
	for n := range d.pages {
		switch {
		case n*pageSize >= size:
			delete(d.pages, n)
		case (n+1)*pageSize > size: // what is cut off must not reappear by growing
			page := bytes.Clone(d.pages[n])
			clear(page[size-n*pageSize:])
			d.pages[n] = page
		}
	}
	d.size = size
}

// holeyDisk is a pageDisk that is no longer written, and knows its holes.
type holeyDisk struct {
	*pageDisk
	data []int64 // pages with data, sorted
}

func (d *pageDisk) holey() *holeyDisk {
	return &holeyDisk{d, slices.Sorted(maps.Keys(d.pages))}
}

func (d *holeyDisk) DataRange(off int64) (start, end int64, err error) {
	i, _ := slices.BinarySearch(d.data, off/pageSize)
	if off >= d.size || i == len(d.data) {
		return 0, 0, io.EOF
	}
	start, end = max(off, d.data[i]*pageSize), (d.data[i]+1)*pageSize
	for i++; i < len(d.data) && d.data[i]*pageSize == end; i++ {
		end += pageSize
	}
	return start, min(end, d.size), nil
}

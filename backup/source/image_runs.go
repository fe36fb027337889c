package source

import (
	"context"
	"errors"
	"os"
	"sort"
	"sync"

	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/backup/qemu"
)

const (
	// runWindow is how much of a disk qemu-img is asked about at once.
	runWindow = 4 << 30
	// runServed is how many bytes of a window the server gives before that: a few blocks of a large disk are
	// not worth starting a program.
	runServed = 16 << 20
	// runWindows is how many windows are kept.
	runWindows = 4
)

// runsDisk is the disk of a qcow2 file. Bytes that lie in the file as they are come from there: their way through the
// server takes as much processor time as hashing them. All others come from the server, which holds the
// image's lock.
type runsDisk struct {
	*nbddisk.Disk

	path   string
	file   *os.File
	window int64 // bytes, runWindow

	ctx    context.Context // of qemu-img
	cancel context.CancelFunc
	asking sync.WaitGroup

	mu      sync.Mutex
	windows map[int64]*window // by their number on the disk
	loaded  []*window         // with runs, the oldest first
}

// window is a part of a disk.
type window struct {
	served  int64 // bytes
	loading bool  // or it failed
	runs    []qemu.Run
}

// readRuns returns disk itself where its file has no runs. On a block device nothing would tell of a writer: QEMU's locks
// are of one device node, and writing changes no time of it.
func (m *image) readRuns(ctx context.Context, disk *nbddisk.Disk) (Bytes, error) {
	if m.host != (here{}) || m.format != qemu.QCOW2 || m.info.DataFile != "" || m.opt.Inspect {
		return disk, nil
	}
	f, err := os.Open(m.path)
	if err != nil {
		return nil, err
	}
	now, err := f.Stat()
	if err != nil || stampOf(now) != m.stamp {
		return nil, errors.Join(errors.New(m.path+" was replaced while it was opened"), err, f.Close())
	}
	if !now.Mode().IsRegular() {
		return disk, f.Close()
	}
	d := &runsDisk{Disk: disk, path: m.path, file: f, window: runWindow, windows: map[int64]*window{}}
	d.ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return d, nil
}

// close ends what reads the file.
func (d *runsDisk) close() error {
	d.cancel()
	d.asking.Wait()
	return d.file.Close()
}

// ask returns the runs of a window.
func (d *runsDisk) ask(start int64) ([]qemu.Run, error) {
	d.asking.Add(1)
	defer d.asking.Done()
	runs, err := qemu.Map(d.ctx, d.path, start, min(d.window, d.Size()-start))
	if err != nil {
		return nil, err
	}
	ours, err := d.file.Stat()
	if err != nil {
		return nil, err
	}
	theirs, err := os.Stat(d.path)
	if err != nil || !os.SameFile(ours, theirs) {
		return nil, errors.Join(errors.New(d.path+" was replaced"), err)
	}
	return runs, nil
}

// ReadAt implements io.ReaderAt.
func (d *runsDisk) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		at := off + int64(n)
		part := p[n:min(int64(len(p)), int64(n)+d.window-at%d.window)]
		run, ok := d.runAt(at, int64(len(part)))
		if ok && run.Start <= at {
			part = part[:min(int64(len(part)), run.Start+run.Length-at)]
			if got, err := d.file.ReadAt(part, run.Offset+at-run.Start); err == nil {
				n += got
				continue
			} // such as a cluster that the file's end cuts off: it reads as zeroes
		} else if ok {
			part = part[:min(int64(len(part)), run.Start-at)]
		}
		got, err := d.Disk.ReadAt(part, at)
		n += got
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// runAt returns the run that holds the byte at off or the next one in its window. It counts length
// bytes as read. It is false if there is none, or as long as nobody has asked.
func (d *runsDisk) runAt(off, length int64) (qemu.Run, bool) {
	number := off / d.window
	d.mu.Lock()
	w := d.windows[number]
	if w == nil {
		w = &window{}
		d.windows[number] = w
	}
	if w.served += length; w.runs == nil && !w.loading && w.served > runServed {
		w.loading = true
		d.mu.Unlock()
		runs, err := d.ask(number * d.window)
		d.mu.Lock()
		if err == nil && len(runs) > 0 { // else the server has all bytes
			w.runs, w.loading = runs, false
			if d.loaded = append(d.loaded, w); len(d.loaded) > runWindows {
				d.loaded[0].runs, d.loaded[0].served = nil, 0
				d.loaded = d.loaded[1:]
			}
		}
	}
	runs := w.runs
	d.mu.Unlock()
	i := sort.Search(len(runs), func(i int) bool { return runs[i].Start+runs[i].Length > off })
	if i == len(runs) {
		return qemu.Run{}, false
	}
	return runs[i], true
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/source"
)

// imageWrites are what a guest writes between two backups, in runs of a quarter of a MiB.
var imageWrites = []struct{ runs, apartMiB int }{{400, 7}, {4000, 1}}

// imageRows back the disk in a qcow2 up, beside qemu-img convert, which copies it.
func imageRows(b *bench) ([]result, error) {
	dir, err := os.MkdirTemp(b.cfg.dir, "image-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	c := &chain{site: &site{b: b, dir: dir}, raw: b.disk, top: filepath.Join(dir, "vm.qcow2")}
	if err := sh("qemu-img", "convert", "-f", "raw", "-O", "qcow2", b.disk, c.top); err != nil {
		return nil, err
	}
	full, err := c.imageFull()
	if err != nil {
		return nil, err
	}
	out := full
	for _, w := range imageWrites {
		increment, err := c.imageIncrement(w.runs, w.apartMiB)
		if err != nil {
			return nil, err
		}
		out = append(out, increment)
	}
	return out, nil
}

// copyImage writes an image to the disk by qemu-img convert.
func (c *chain) copyImage(args ...string) func() (sample, error) {
	return func() (sample, error) {
		to := filepath.Join(c.dir, "copy.qcow2")
		defer os.Remove(to)
		settle()
		s, err := c.b.exec("qemu-img", append(append([]string{"convert", "-f", "qcow2", "-O", "qcow2"}, args...), to)...)
		return synced(s, err, to)
	}
}

func (c *chain) imageFull() ([]result, error) {
	ours := func() (sample, error) {
		s, err := c.b.newSite()
		if err != nil {
			return sample{}, err
		}
		defer s.remove()
		return s.save(c.top)
	}
	if _, err := ours(); err != nil { // warm the page cache
		return nil, err
	}
	a, p, err := c.b.pair(ours, c.copyImage(c.top))
	if err != nil {
		return nil, err
	}
	out := []result{slower("full backup of a qcow2", "qemu-img convert", atMost(1, "<= 1.00 x its time"),
		"convert copies, and a backup hashes and compresses too", a, p)}

	// One connection, one request at a time: what a simple client does.
	single := func() (sample, error) {
		srv, err := c.serveQemu()
		if err != nil {
			return sample{}, err
		}
		settle()
		s, err := c.b.exec("nbdcopy", "--connections=1", "--requests=1", "--threads=1", srv.uri, "null:")
		return s, errors.Join(err, srv.stop())
	}
	if a, p, err = c.b.pair(ours, single); err != nil {
		return nil, err
	}
	out = append(out, faster("full backup of a qcow2", "one reader of its export, which stores nothing", atLeast(2, ">= 2 x"),
		"the reader throws away what it reads, and a backup hashes and compresses it", a, p))
	reading := func() (sample, error) { settle(); return readSource(c.top) }
	if a, p, err = c.b.pair(reading, single); err != nil {
		return nil, err
	}
	return append(out, faster("the disk of a qcow2 read as a backup reads it, in this process, opening included", "one connection to its qemu-nbd, one request at a time",
		atLeast(2, ">= 2 x"), "both read from the page cache", a, p)), nil
}

// readSource reads what a source has, on all processors, as the workers of a backup do.
func readSource(path string) (s sample, err error) {
	cpu := func() (d time.Duration) {
		for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
			var ru syscall.Rusage
			if err := syscall.Getrusage(who, &ru); err == nil {
				d += time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
			}
		}
		return d
	}
	start, spent := time.Now(), cpu()
	session, err := source.Open(context.Background(), path, source.Options{})
	if err != nil {
		return s, err
	}
	const piece = 1 << 20
	disk := session.Disks()[0].Bytes
	holes, _ := disk.(backup.HoleFinder)
	var next atomic.Int64
	var workers errgroup.Group
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() error {
			p := make([]byte, piece)
			for {
				off := next.Add(piece) - piece
				if off >= disk.Size() {
					return nil
				}
				if holes != nil {
					from, _, err := holes.DataRange(off)
					if errors.Is(err, io.EOF) || err == nil && from >= off+piece {
						continue
					}
				}
				if _, err := disk.ReadAt(p[:min(piece, disk.Size()-off)], off); err != nil {
					return err
				}
			}
		})
	}
	err = errors.Join(workers.Wait(), session.Close())
	return sample{wall: time.Since(start), cpu: cpu() - spent}, err
}

// imageIncrement writes to a copy of the image each time: to an overlay for the peer, which
// copies the overlay.
func (c *chain) imageIncrement(runs, apartMiB int) (result, error) {
	var writes []string
	for i := range runs { // not over the superblock: it would be another disk
		writes = append(writes, "-c", fmt.Sprintf("write -P %d %dM 256k", 1+i%255, 1+i*apartMiB))
	}
	ours := func() (sample, error) {
		s, err := c.b.newSite()
		if err != nil {
			return sample{}, err
		}
		defer s.remove()
		vm := filepath.Join(s.dir, "vm.qcow2")
		if err := sh("cp", "--reflink=auto", c.top, vm); err != nil {
			return sample{}, err
		}
		if _, err := s.save(vm, "--track"); err != nil {
			return sample{}, err
		}
		if err := sh("qemu-io", append(append([]string{"-f", "qcow2"}, writes...), vm)...); err != nil {
			return sample{}, err
		}
		return s.save(vm)
	}
	over := filepath.Join(c.dir, "over.qcow2")
	if err := sh("qemu-img", "create", "-q", "-f", "qcow2", "-b", c.top, "-F", "qcow2", over); err != nil {
		return result{}, err
	}
	if err := sh("qemu-io", append(append([]string{"-f", "qcow2"}, writes...), over)...); err != nil {
		return result{}, err
	}
	a, p, err := c.b.pair(ours, c.copyImage("-B", c.top, "-F", "qcow2", over))
	if err != nil {
		return result{}, err
	}
	return slower(fmt.Sprintf("increment of a qcow2 by its bitmap, %d MiB written, spot check included", runs/4), "qemu-img convert of an overlay", atMost(1, "<= 1.00 x its time"),
		"the key derived from the password (scrypt, 0.15 s of CPU), two runs of qemu-img for the bitmaps and the syncs of three flushes are a floor that does not shrink with the change", a, p), nil
}

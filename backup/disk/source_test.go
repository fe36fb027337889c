package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

func addressOf(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }

func TestSourceReadsFilesOfAnySize(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 512, 513, 4095, 4096, 4097, 1<<20 - 1, 1 << 20, 1<<20 + 1, 3<<20 + 4095} {
		for _, buffered := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d buffered %v", size, buffered), func(t *testing.T) {
				content := random(size, uint64(size))
				s := openSource(t, tempFile(t, content), Options{Buffered: buffered})

				if s.Size() != size || s.Device() || s.InUse() != "" {
					t.Errorf("Size %d, Device %v, InUse %q", s.Size(), s.Device(), s.InUse())
				}

				if buffered && s.Direct() {
					t.Error("direct I/O in spite of Options.Buffered")
				}

				checkReads(t, s, content)
			})
		}
	}
}

// TestSourceInMemory reads from a file system that may have no direct I/O.
func TestSourceInMemory(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "varve")
	if err != nil {
		t.Skipf("no file system in memory: %v", err)
	}

	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})

	content := random(1<<20+77, 1)
	path := filepath.Join(dir, "disk.img")

	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}

	checkReads(t, openSource(t, path, Options{}), content)
}

// TestSourceFallsBack reads through a descriptor that refuses direct I/O with EINVAL,
// as some file systems do at the first read only.
func TestSourceFallsBack(t *testing.T) {
	content := random(1<<20+77, 1)
	path := tempFile(t, content)
	s := openSource(t, path, Options{})

	if !s.Direct() {
		t.Skip("the file system of the temporary directory has no direct I/O")
	}

	s.block = 1 // claims that any alignment works
	checkReads(t, s, content)

	if s.Direct() {
		t.Error("still direct after a refused read")
	}
}

func TestSourceReadsDevices(t *testing.T) {
	for _, sector := range sectorSizes {
		for _, size := range loopSizes {
			if size%sector != 0 {
				continue // see TestSourceTailThatNobodyCanRead
			}

			t.Run(fmt.Sprintf("%d of %d", size, sector), func(t *testing.T) {
				content := random(size, uint64(size))
				s := openSource(t, loop(t, tempFile(t, content), sectorOption(sector)), Options{})

				if s.Size() != size || !s.Device() || s.SectorSize() != sector || !s.Direct() {
					t.Errorf("Size %d, Device %v, SectorSize %d, Direct %v", s.Size(), s.Device(), s.SectorSize(), s.Direct())
				}

				checkReads(t, s, content)

				if !s.Direct() {
					t.Error("direct I/O was given up")
				}
			})
		}
	}
}

// TestSourceTailThatNobodyCanRead: a device of 4096-byte blocks whose size is no multiple of
// them has a tail that the kernel cannot read.
func TestSourceTailThatNobodyCanRead(t *testing.T) {
	content := random(8192+512, 1)
	s := openSource(t, loop(t, tempFile(t, content), sectorOption(4096)), Options{})

	got := make([]byte, len(content))

	n, err := s.ReadAt(got, 0)

	var bad *ReadError
	if n != 8192 || !errors.As(err, &bad) || bad.Offset != 8192 || bad.Length != 512 {
		t.Errorf("ReadAt = %d, %v; want 8192 and a *ReadError for the last 512 bytes", n, err)
	}

	if !bytes.Equal(got[:n], content[:n]) {
		t.Error("other bytes than the disk's")
	}
}

func TestSourceRefusesWhatIsNoDisk(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}

	for _, path := range []string{t.TempDir(), "/dev/null", pipe} {
		if _, err := Open(path, Options{}); !errors.Is(err, ErrNotADisk) {
			t.Errorf("Open(%s) = %v, want %v", path, err, ErrNotADisk)
		}

		if _, err := OpenTarget(path, TargetOptions{}); !errors.Is(err, ErrNotADisk) {
			t.Errorf("OpenTarget(%s) = %v, want %v", path, err, ErrNotADisk)
		}
	}

	if _, err := Open(filepath.Join(t.TempDir(), "none"), Options{}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "name a block device") {
		t.Errorf("Open of nothing = %v", err)
	}
}

func TestSourceNoticesAChangedSize(t *testing.T) {
	path := tempFile(t, random(1<<20, 1))
	s := openSource(t, path, Options{})

	if err := s.CheckSize(); err != nil {
		t.Fatal(err)
	}

	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}

	if err := s.CheckSize(); !errors.Is(err, ErrSizeChanged) {
		t.Errorf("grown: CheckSize = %v, want %v", err, ErrSizeChanged)
	}

	if err := os.Truncate(path, 5000); err != nil {
		t.Fatal(err)
	}

	if err := s.CheckSize(); !errors.Is(err, ErrSizeChanged) {
		t.Errorf("shrunk: CheckSize = %v, want %v", err, ErrSizeChanged)
	}

	p := make([]byte, 10_000)
	if n, err := s.ReadAt(p, 0); n > 5000 || !errors.Is(err, ErrSizeChanged) {
		t.Errorf("shrunk: ReadAt = %d, %v; want %v", n, err, ErrSizeChanged)
	}

	if _, _, err := s.DataRange(6000); !errors.Is(err, ErrSizeChanged) {
		t.Errorf("shrunk: DataRange = %v, want %v", err, ErrSizeChanged)
	}
}

// TestSourceNoticesAResizedDevice grows the file under a loop device and informs the kernel.
func TestSourceNoticesAResizedDevice(t *testing.T) {
	path := tempFile(t, random(1<<20, 1))
	device := loop(t, path)
	s := openSource(t, device, Options{})

	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}

	if err := s.CheckSize(); err != nil {
		t.Errorf("before the device knows: %v", err)
	}

	run(t, "losetup", "-c", device)

	if err := s.CheckSize(); !errors.Is(err, ErrSizeChanged) {
		t.Errorf("CheckSize = %v, want %v", err, ErrSizeChanged)
	}
}

// TestSourceNamesTheBadSector truncates the file under a loop device: beyond its end reads
// return EIO.
func TestSourceNamesTheBadSector(t *testing.T) {
	const size, good = 1 << 20, 300 * 1024

	for _, sector := range sectorSizes {
		for _, buffered := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d buffered %v", sector, buffered), func(t *testing.T) {
				content := random(size, 3)
				path := tempFile(t, content)
				device := loop(t, path, sectorOption(sector))

				if err := os.Truncate(path, good); err != nil {
					t.Fatal(err)
				}

				s := openSource(t, device, Options{Buffered: buffered})

				for _, from := range []int64{0, 4096, 4096 + 17, good - 1, good, good + 4096, size - 1} {
					p := AlignedBuffer(size)[:size-from]

					n, err := s.ReadAt(p, from)

					var bad *ReadError
					if !errors.As(err, &bad) || !errors.Is(err, unix.EIO) {
						t.Fatalf("ReadAt(%d) = %d, %v; want a *ReadError", from, n, err)
					}

					unit := sector
					if buffered {
						unit = pageSize
					}

					want := max(from, good) / unit * unit
					if offset, length := bad.BadRange(); offset != want || length != unit {
						t.Errorf("ReadAt(%d): bad range %d, %d; want %d, %d", from, offset, length, want, unit)
					}

					if int64(n) != max(good-from, 0) || !bytes.Equal(p[:n], content[from:from+int64(n)]) {
						t.Errorf("ReadAt(%d) read %d bytes, want %d, those of the disk", from, n, max(good-from, 0))
					}
				}

				// The readable part can still be read.
				if n, err := s.ReadAt(make([]byte, good), 0); n != good || err != nil {
					t.Errorf("ReadAt before the bad range = %d, %v", n, err)
				}
			})
		}
	}
}

func TestSourceDataRanges(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sparse.img")

	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}

	const size = 16 << 20
	for _, offset := range []int64{1 << 20, 5 << 20, 6 << 20} {
		if _, err := f.WriteAt(random(64<<10, 1), offset); err != nil {
			t.Fatal(err)
		}
	}

	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}

	s := openSource(t, path, Options{})
	covered := make([]bool, size>>16)
	count := 0

	for at := int64(0); ; {
		start, end, err := s.DataRange(at)
		if errors.Is(err, io.EOF) {
			break
		}

		if err != nil {
			t.Fatal(err)
		}

		if start < at || end <= start || end > size {
			t.Fatalf("DataRange(%d) = %d, %d", at, start, end)
		}

		for i := start; i < end; i += 1 << 16 {
			covered[i>>16] = true
			count++
		}

		at = end
	}

	for _, offset := range []int64{1 << 20, 5 << 20, 6 << 20} {
		if !covered[offset>>16] {
			t.Errorf("the data at %d is in a hole", offset)
		}
	}

	if count == len(covered) {
		t.Log("the file system of the temporary directory has no holes")
	}

	if _, _, err := s.DataRange(size); !errors.Is(err, io.EOF) {
		t.Errorf("DataRange at the end = %v, want io.EOF", err)
	}

	if _, _, err := s.DataRange(-1); err == nil {
		t.Error("DataRange(-1) is no error")
	}

	device := openSource(t, loop(t, path), Options{})
	if start, end, err := device.DataRange(4096); start != 4096 || end != size || err != nil {
		t.Errorf("DataRange of a device = %d, %d, %v", start, end, err)
	}
}

// BenchmarkSourceDepth reads a disk once in order, by several workers with one request each,
// as the backup engine does. VARVE_BENCH_DISK names a disk or image larger than any cache
// involved.
func BenchmarkSourceDepth(b *testing.B) {
	path := os.Getenv("VARVE_BENCH_DISK")
	if path == "" {
		b.Skip("VARVE_BENCH_DISK names no disk to read")
	}

	for _, buffered := range []bool{false, true} {
		for _, unit := range []int64{1 << 20, 4 << 20} {
			for _, depth := range []int{1, 2, 3, 4} {
				b.Run(fmt.Sprintf("buffered=%v/unit=%dMiB/depth=%d", buffered, unit>>20, depth), func(b *testing.B) {
					s, err := Open(path, Options{Buffered: buffered, Live: true})
					if err != nil {
						b.Fatal(err)
					}

					b.Cleanup(func() {
						if err := s.Close(); err != nil {
							b.Error(err)
						}
					})

					b.SetBytes(s.Size())

					for b.Loop() {
						var (
							next  atomic.Int64
							group errgroup.Group
						)

						for range depth {
							group.Go(func() error {
								p := AlignedBuffer(int(unit))
								for {
									at := next.Add(unit) - unit
									if at >= s.Size() {
										return nil
									}

									if _, err := s.ReadAt(p, at); err != nil && !errors.Is(err, io.EOF) {
										return err
									}
								}
							})
						}

						if err := group.Wait(); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}

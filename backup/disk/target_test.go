package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// scribble writes and zeroes at random, on the target and on model, and compares what the
// target reads back and the final content.
func scribble(t *testing.T, target *Target, path string, model []byte, seed uint64) {
	t.Helper()

	dice := rand.New(rand.NewPCG(seed, 11))
	memory := AlignedBuffer(len(model) + 64)
	size := len(model)

	for range 60 {
		if size == 0 {
			break
		}

		offset := dice.IntN(size)
		length := 1 + dice.IntN(min(size-offset, 300_000))

		if dice.IntN(2) == 0 { // aligned
			offset &^= pageSize - 1
			length = min((length+pageSize-1)&^(pageSize-1), size-offset)
		}

		switch dice.IntN(5) {
		case 0, 1:
			p := memory[dice.IntN(2)*dice.IntN(64):][:length]
			copy(p, random(int64(length), dice.Uint64()))
			copy(model[offset:], p)

			if n, err := target.WriteAt(p, int64(offset)); n != length || err != nil {
				t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", length, offset, n, err)
			}
		case 2, 3:
			clear(model[offset : offset+length])

			if err := target.ZeroRange(int64(offset), int64(length)); err != nil {
				t.Fatalf("ZeroRange(%d, %d): %v", offset, length, err)
			}
		default:
			p := memory[dice.IntN(2)*dice.IntN(64):][:length]
			if n, err := target.ReadAt(p, int64(offset)); n != length || err != nil && !errors.Is(err, io.EOF) {
				t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", length, offset, n, err)
			}

			if !bytes.Equal(p, model[offset:offset+length]) {
				t.Fatalf("ReadAt(%d bytes, %d): not what was written", length, offset)
			}
		}
	}

	if err := target.Sync(); err != nil {
		t.Fatal(err)
	}

	checkReads(t, target, model)

	if err := target.Close(); err != nil {
		t.Fatal(err)
	}

	checkReads(t, openSource(t, path, Options{}), model)
}

func TestTargetNewFile(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 4095, 4096, 4097, 1<<20 - 1, 1<<20 + 1, 3 << 20} {
		for _, buffered := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d buffered %v", size, buffered), func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "new.img")
				target := openTarget(t, path, TargetOptions{Size: size, Buffered: buffered})

				if !target.Fresh() || target.Size() != size || target.Device() {
					t.Errorf("Fresh %v, Size %d, Device %v", target.Fresh(), target.Size(), target.Device())
				}

				scribble(t, target, path, make([]byte, size), uint64(size))
			})
		}
	}
}

func TestTargetInMemory(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "varve")
	if err != nil {
		t.Skipf("no file system in memory: %v", err)
	}

	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})

	path := filepath.Join(dir, "new.img")
	scribble(t, openTarget(t, path, TargetOptions{Size: 1<<20 + 5}), path, make([]byte, 1<<20+5), 1)
}

func TestTargetKeepsAFile(t *testing.T) {
	content := random(1<<20+99, 1)

	for _, size := range []int64{1<<20 + 99, 1 << 19, 2 << 20} {
		path := tempFile(t, content)
		target := openTarget(t, path, TargetOptions{Size: size, Keep: true})
		if info, err := os.Stat(path); err != nil || info.Size() != int64(len(content)) {
			t.Errorf("the size was changed before it was asked for: %v", err)
		}

		if err := target.Fit(); err != nil {
			t.Fatal(err)
		}

		if target.Fresh() || target.Size() != size {
			t.Errorf("Fresh %v, Size %d; want false, %d", target.Fresh(), target.Size(), size)
		}

		model := make([]byte, size)
		copy(model, content)
		scribble(t, target, path, model, uint64(size))
	}
}

func TestTargetEmptiesAFile(t *testing.T) {
	path := tempFile(t, random(1<<20, 1))
	target := openTarget(t, path, TargetOptions{Size: 5000})

	if !target.Fresh() || target.Size() != 5000 {
		t.Errorf("Fresh %v, Size %d; want true, 5000", target.Fresh(), target.Size())
	}

	checkReads(t, target, make([]byte, 5000))
}

func TestTargetDevice(t *testing.T) {
	for _, sector := range sectorSizes {
		for _, size := range loopSizes {
			if size%sector != 0 {
				continue
			}

			for _, buffered := range []bool{false, true} {
				t.Run(fmt.Sprintf("%d of %d buffered %v", size, sector, buffered), func(t *testing.T) {
					model := random(size, 1)
					device := loop(t, tempFile(t, model), sectorOption(sector))
					target := openTarget(t, device, TargetOptions{Size: size, Buffered: buffered})

					if target.Fresh() || !target.Device() || target.Size() != size || target.SectorSize() != sector || target.Direct() == buffered {
						t.Errorf("Fresh %v, Device %v, Size %d, SectorSize %d, Direct %v",
							target.Fresh(), target.Device(), target.Size(), target.SectorSize(), target.Direct())
					}

					scribble(t, target, device, model, uint64(size))
				})
			}
		}
	}
}

// TestTargetZeroMethods tries each way to make zeroes.
func TestTargetZeroMethods(t *testing.T) {
	for _, method := range []zeroMethod{zeroByIoctl, zeroByHole, zeroByRange, zeroByWrite} {
		path := tempFile(t, random(1<<20, 1))
		target := openTarget(t, path, TargetOptions{Size: 1 << 20, Keep: true})
		target.zeroing.Store(int32(method)) // zeroByIoctl does not work on a file

		if err := target.ZeroRange(0, 1<<20); err != nil {
			t.Fatalf("method %d: %v", method, err)
		}

		checkReads(t, target, make([]byte, 1<<20))

		if now := zeroMethod(target.zeroing.Load()); method == zeroByIoctl && now != zeroByWrite || now < method {
			t.Errorf("method %d became %d", method, now)
		}
	}
}

// TestTargetStaysSparse: zeroes and unwritten parts take no space.
func TestTargetStaysSparse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new.img")
	target := openTarget(t, path, TargetOptions{Size: 64 << 20})

	if err := target.ZeroRange(0, 64<<20); err != nil {
		t.Fatal(err)
	}

	if _, err := target.WriteAt(random(8<<20, 1), 4<<20); err != nil {
		t.Fatal(err)
	}

	if err := target.ZeroRange(3<<20, 8<<20); err != nil {
		t.Fatal(err)
	}

	if err := target.Sync(); err != nil {
		t.Fatal(err)
	}

	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}

	if room := st.Blocks * 512; room < 1<<20 || room > 2<<20 {
		t.Errorf("the file takes %d bytes, want a little over 1 MiB", room)
	}
}

// TestTargetConcurrentEdges writes neighbouring unaligned pieces at once: no write may
// undo another's.
func TestTargetConcurrentEdges(t *testing.T) {
	const size, piece = 1 << 20, 5000

	path := tempFile(t, make([]byte, size))
	target := openTarget(t, path, TargetOptions{Size: size, Keep: true})
	want := random(size, 5)
	errs := make(chan error)

	const writers = 4
	for w := range writers {
		go func() {
			var err error
			for at := w * piece; at < size && err == nil; at += writers * piece {
				_, err = target.WriteAt(want[at:min(at+piece, size)], int64(at))
			}

			errs <- err
		}()
	}

	for range writers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}

	checkReads(t, target, want)
}

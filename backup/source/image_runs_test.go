package source

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// TestImageRunsConcurrent reads one from many goroutines.
func TestImageRunsConcurrent(t *testing.T) {
	t.Parallel()
	diskfstest.NeedTool(t, "qemu-img")
	dir := t.TempDir()
	disk := make([]byte, 40<<20)
	rng := rand.New(rand.NewPCG(3, 4))
	for i := 0; i < len(disk); i += 4096 {
		disk[i] = byte(rng.Uint32())
	}
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "disk.qcow2")
	if err := os.WriteFile(raw, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s, err := Open(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b := s.Disks()[0].Bytes
	var all sync.WaitGroup
	for n := range 4 {
		all.Go(func() {
			p := make([]byte, 100_000)
			for off := n * 1000; off+len(p) <= len(disk); off += len(p) {
				if _, err := b.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, disk[off:off+len(p)]) {
					t.Errorf("at %d: %v", off, err)
					return
				}
			}
		})
	}
	all.Wait()
	if d, ok := b.(*runsDisk); !ok || len(d.loaded) != 1 {
		t.Error("no bytes came from the file itself")
	}
}

// TestImageRuns reads qcow2 files whose bytes lie in the file itself, and beside these compressed ones, zeroes and
// those of a backing file: all are what QEMU reads, and where most lie in the file they come from there.
func TestImageRuns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	qemuTool := func(name string, args ...string) {
		t.Helper()
		diskfstest.NeedTool(t, name)
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
	}
	const size = 48 << 20
	disk := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < size; i += 1 << 20 {
		if i>>20%5 == 4 {
			continue // a hole
		}
		for j := i; j < i+1<<20; j += 512 {
			disk[j] = byte(rng.Uint32())
			disk[j+1] = byte(j >> 9)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "raw"), disk, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuTool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "plain.qcow2")
	qemuTool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "raw", "small.qcow2")
	qemuTool("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "raw", "compressed.qcow2")
	qemuTool("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "raw", "mixed.qcow2")
	qemuTool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=data,data_file_raw=off", "raw", "outside.qcow2")
	qemuTool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "plain.qcow2", "-F", "qcow2", "over.qcow2")
	qemuTool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k", "-b", "plain.qcow2", "-F", "qcow2", "parts.qcow2")
	qemuTool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "snapshot.qcow2")
	qemuTool("qemu-img", "snapshot", "-c", "before", "snapshot.qcow2")
	for _, name := range []string{"mixed.qcow2", "over.qcow2", "parts.qcow2", "snapshot.qcow2"} {
		qemuTool("qemu-io", "-f", "qcow2", "-c", "write -P 7 5000000 20000000", "-c", "write -z 30M 3M", "-c", "discard 36M 1M",
			"-c", "write -P 9 40000512 512", name)
	}
	// The last clusters end with the file, or are cut off by it: QEMU reads zeroes behind its end.
	qemuTool("qemu-img", "create", "-q", "-f", "qcow2", "cut.qcow2", "48M")
	qemuTool("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 20000000", "cut.qcow2")
	if fi, err := os.Stat(filepath.Join(dir, "cut.qcow2")); err != nil {
		t.Fatal(err)
	} else if err := os.Truncate(filepath.Join(dir, "cut.qcow2"), fi.Size()-100_000); err != nil {
		t.Fatal(err)
	}
	for name, direct := range map[string]bool{
		"plain": true, "small": true, "compressed": false, "mixed": true, "outside": false, "over": true, "parts": true, "snapshot": true, "cut": true,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(dir, name+".qcow2")
			raw := filepath.Join(t.TempDir(), "raw")
			qemuTool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
			want, err := os.ReadFile(raw)
			if err != nil {
				t.Fatal(err)
			}
			s, err := Open(t.Context(), path, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}()
			b := s.Disks()[0].Bytes
			d, ok := b.(*runsDisk)
			if ok {
				d.window = 9 << 20 // six of them, the last one shorter, and more than are kept
			}
			for range 3 { // by the server, by both, and from the file
				got := make([]byte, 0, size)
				for p := make([]byte, 777_777); len(got) < size; {
					n, err := b.ReadAt(p, int64(len(got)))
					if err != nil && !errors.Is(err, io.EOF) || n == 0 {
						t.Fatal(n, err)
					}
					got = append(got, p[:n]...)
				}
				if !bytes.Equal(got, want) {
					t.Fatal("it is not what QEMU reads")
				}
			}
			if n, err := b.ReadAt(make([]byte, 10), size-4); n != 4 || !errors.Is(err, io.EOF) {
				t.Errorf("at the end: %d, %v", n, err)
			}
			if used := ok && len(d.loaded) > 0; used != direct {
				t.Errorf("bytes came from the file itself: %v", used)
			}
			if err := s.Check(t.Context()); err != nil {
				t.Error(err)
			}
			s.(*image).srv.(*qemu.Server).Abort() // the lock goes with it
			if err := s.Check(t.Context()); err == nil {
				t.Error("nothing is wrong without the server's lock")
			}
		})
	}
}

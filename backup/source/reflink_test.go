package source_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// reflinkFS mounts a file system that has reflinks, and returns its directory.
func reflinkFS(t *testing.T, kind string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a file system with reflinks")
	}
	diskfstest.NeedTool(t, "mkfs."+kind)
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil || !strings.Contains(string(known), "\t"+kind+"\n") {
		t.Skipf("the kernel has no %s", kind)
	}
	image := filepath.Join(t.TempDir(), "fs")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 400<<20)); err != nil {
		t.Fatal(err)
	}
	tool(t, "mkfs."+kind, "-q", image)
	dir, _ := diskfstest.Mount(t, image, "")
	return dir
}

// scribble changes a file as a guest does: writes, holes, zeroes, another size.
func scribble(t *testing.T, path string, rnd *rand.Rand) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 6 {
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		off := rnd.Int64N(info.Size())
		n := 1 + rnd.Int64N(min(200_000, info.Size()-off))
		switch rnd.IntN(6) {
		case 0, 1, 2:
			_, err = f.WriteAt(bytes.Repeat([]byte{byte(rnd.Uint32())}, int(n)), off)
		case 3:
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		case 4:
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		case 5: // shrinks and grows, by no whole blocks
			err = errors.Join(f.Truncate(info.Size()-min(n, info.Size()/4)), f.Truncate(info.Size()+rnd.Int64N(30_000)))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestReflink backs a raw image up again and again, each time by what it does not share with
// the backup before.
func TestReflink(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			dir := reflinkFS(t, kind)
			path := filepath.Join(dir, "vm.img")
			rnd := rand.New(rand.NewPCG(7, 7))
			content := make([]byte, 6<<20+1000)
			for i := range content[:5<<20] {
				content[i] = byte(rnd.Uint32())
			}
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			last := take(t, path, track, nil)
			if last.by != "allocation" || !bytes.Equal(last.bytes, content) {
				t.Errorf("the full is by %s (%v), or has other bytes", last.by, last.why)
			}
			for round := range 12 {
				scribble(t, path, rnd)
				want, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				last = take(t, path, source.Options{Owner: track.Owner}, last)
				if last.by != "reflink" || !bytes.Equal(last.bytes, want) {
					t.Fatalf("round %d: by %s (%v), or other bytes", round, last.by, last.why)
				}
			}
			left(t, dir, 1)
			s, err := source.Open(t.Context(), path, track)
			if err != nil {
				t.Fatal(err)
			}
			rep, err := s.Disks()[0].Changes[0].Changes(t.Context(), cbt.Request{Size: s.Disks()[0].Bytes.Size(), Base: &cbt.Base{ChangeID: last.id, Size: int64(len(last.bytes))}},
				func(cbt.Extent) error { return nil })
			if err := errors.Join(err, s.Close()); err != nil || rep.Reported != 0 {
				t.Errorf("of an image that nothing wrote to %d bytes are read, %v", rep.Reported, err)
			}

			// What is not to be trusted, is not.
			clone := filepath.Join(dir, strings.Split(last.id, "@")[0])
			if err := errors.Join(os.Chmod(clone, 0o600), os.WriteFile(clone, []byte("x"), 0o600)); err != nil {
				t.Fatal(err)
			}
			last = take(t, path, track, last)
			if last.by != "allocation" || len(last.why) != 1 || !strings.Contains(last.why[0].Error(), "was written to") {
				t.Errorf("a clone that was written to: by %s (%v)", last.by, last.why)
			}
			if err := os.Remove(filepath.Join(dir, strings.Split(last.id, "@")[0])); err != nil {
				t.Fatal(err)
			}
			if last = take(t, path, track, last); last.by != "allocation" {
				t.Errorf("a clone that is gone: by %s (%v)", last.by, last.why)
			}
			removed, err := source.Forget(t.Context(), path, source.Options{})
			if err != nil || len(removed) != 1 {
				t.Errorf("forgot %v, %v", removed, err)
			}
			left(t, dir, 0)
		})
	}
}

// left counts the clones.
func left(t *testing.T, dir string, want int) {
	t.Helper()
	if names, err := filepath.Glob(filepath.Join(dir, ".vm.img.clone-varve-*")); err != nil || len(names) != want {
		t.Errorf("clones that are left: %v, %v; want %d", names, err, want)
	}
}

// TestReflinkMoment reads the image as it was when the backup began, and leaves nothing of a
// backup that failed.
func TestReflinkMoment(t *testing.T) {
	t.Parallel()
	dir := reflinkFS(t, "xfs")
	path := filepath.Join(dir, "vm.img")
	content := bytes.Repeat([]byte("moment "), 1<<16)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := source.Open(t.Context(), path, track)
	if err != nil {
		t.Fatal(err)
	}
	scribble(t, path, rand.New(rand.NewPCG(1, 1)))
	if now := takeSession(t, s, nil); !bytes.Equal(now.bytes, content) || s.Check(t.Context()) != nil {
		t.Error("what is written while the image is read is in the backup")
	}
	left(t, dir, 1)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	left(t, dir, 0)
	if _, err := source.Open(t.Context(), filepath.Join(t.TempDir(), "none"), track); err == nil {
		t.Error("an image that is not there was opened")
	}
}

// sharingSource is a source of a session that ends with the test.
type sharingSource struct {
	cbt.Source
	target, base, baseID, volume string
}

// Changes gives the states the names of the listing; theirs are the clones'.
func (s sharingSource) Changes(ctx context.Context, req cbt.Request, emit func(cbt.Extent) error) (cbt.Report, error) {
	if req.Base != nil && req.Base.ChangeID == s.base {
		was := *req.Base
		was.ChangeID, req.Base = s.baseID, &was
	}
	rep, err := s.Source.Changes(ctx, req, emit)
	if rep.BaseChangeID != "" {
		rep.BaseChangeID = s.base
	}
	rep.TargetChangeID, rep.VolumeHandle = s.target, s.volume
	return rep, err
}

func TestReflinkChanges(t *testing.T) {
	t.Parallel()
	dir := reflinkFS(t, "xfs")
	wire, blocks := "no list comes over a wire", "blocks of 4096 bytes are compared"
	leftOut := map[string]string{
		"Unaligned": blocks, "Many": blocks, "WrongVolume": "a file has no volume",
		"Grown": "the size of the base is not in the script", "Shrunk": "the size of the base is not in the script",
	}
	for name := range cbttest.Cases {
		if strings.HasPrefix(name, "Broken") || strings.HasPrefix(name, "Cut") || strings.HasPrefix(name, "EndsEarly") {
			leftOut[name] = wire
		}
	}
	for _, name := range []string{"Straddling", "Repeating", "Duplicated", "Overlapping", "BehindTheEnd", "NegativeOffset", "NegativeLength", "EmptyExtent", "Overflowing"} {
		leftOut[name] = wire
	}
	n := 0
	cbttest.All(t, leftOut, func(t *testing.T, l cbttest.Listing) cbt.Source {
		n++
		path := filepath.Join(dir, "disk"+strings.Repeat("x", n))
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		write := func(off, length int64, value byte) {
			if _, err := f.WriteAt(bytes.Repeat([]byte{value}, int(length)), off); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Truncate(l.Size); err != nil {
			t.Fatal(err)
		}
		opened := sharingSource{target: l.Target, base: "snapshot-1", volume: l.Volume}
		if l.Base != "" {
			write(0, l.Size, 1)
			s, err := source.Open(t.Context(), path, track)
			if err != nil {
				t.Fatal(err)
			}
			opened.baseID = takeSession(t, s, nil).id
			if err := errors.Join(s.Commit(t.Context()), s.Close()); err != nil {
				t.Fatal(err)
			}
			if l.Base != opened.base {
				opened.baseID = "of another"
			}
		}
		for _, e := range l.Extents {
			if e.Zero {
				err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.Offset, e.Length)
			} else if l.Fixed != 0 {
				end := min((e.End()+l.Fixed-1)/l.Fixed*l.Fixed, l.Size)
				write(e.Offset/l.Fixed*l.Fixed, end-e.Offset/l.Fixed*l.Fixed, 2)
			} else {
				write(e.Offset, e.Length, 2)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		s, err := source.Open(t.Context(), path, track)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		opened.Source = s.Disks()[0].Changes[0]
		if l.Base == "" {
			opened.Source = s.Disks()[0].Changes[1]
		}
		return opened
	})
}

package fusefs_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// If storage does not answer, a read of a disk or of a file takes the time limit, and fails,
// each time; so does opening what was not open. What is in memory can still be read; and when
// the storage is back the reads work without a new mount.
func TestStorageGone(t *testing.T) {
	const limit = 300 * time.Millisecond
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "mkfs.ext4")
	image := diskfstest.NewImage(t, 32*mib)
	diskfstest.Run(t, "mkfs.ext4", "-q", "-F", image)
	dir, unmount := diskfstest.Mount(t, image, "")
	data := make([]byte, 8*mib)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
	if err := os.WriteFile(dir+"/data", data, 0o600); err != nil {
		t.Fatal(err)
	}
	unmount()
	disk, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	other := shopDB
	other.Name = "other"
	for name, fault := range map[string]repotest.Fault{
		"silent": {},
		// A call that ignores cancellation, as in a broken mount.
		"deaf": {Deaf: true},
	} {
		t.Run(name, func(t *testing.T) {
			repo, faults := repotest.New(t).OpenFaulty(t)
			save(t, repo, shopDB, image)
			save(t, repo, other, image)
			m := mount(t, repo, fusefs.Options{ReadTimeout: limit, Refresh: -1})
			// inTime repeats what took longer than the limit: so does a busy machine, and a reader may still join
			// a load that began during the outage.
			inTime := func(do func() error) error {
				err := do()
				for end := time.Now().Add(5 * time.Minute); errors.Is(err, syscall.EIO) && time.Now().Before(end); {
					err = do()
				}
				return err
			}
			open := func(name string) (f *os.File) {
				t.Helper()
				err := inTime(func() (err error) {
					f, err = os.Open(m.latest(shopDB, name))
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { f.Close() }) // only read
				// Nothing is read ahead: the tested bytes are not in the cache.
				if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
					t.Fatal(err)
				}
				return f
			}
			img, file := open("disk.img"), open("files/data")
			read := func(f *os.File, want []byte, off int64) error {
				got := make([]byte, 4096)
				_, err := f.ReadAt(got, off)
				if err == nil && !bytes.Equal(got, want[off:off+4096]) {
					t.Fatalf("other bytes at %d", off)
				}
				return err
			}
			near := func() error { return errors.Join(read(img, disk, 0), read(file, data, 0)) }
			if err := inTime(near); err != nil {
				t.Fatal(err)
			}
			repo.ReadFromStorage() // what save wrote is in memory
			hold := make(chan struct{})
			fault.Hold, fault.Err = hold, errors.New("gone")
			faults.Add(fault)
			const far = 6 * mib
			at := int64(bytes.Index(disk, data[far:far+4096]))
			if at < 0 {
				t.Fatal("the file is not in one piece")
			}
			for i := range 2 {
				// Several read the same, and wait for each other.
				var readers sync.WaitGroup
				for range 4 {
					readers.Go(func() {
						if err := read(img, disk, at); !errors.Is(err, syscall.EIO) {
							t.Errorf("read %d of the disk: %v", i, err)
						}
						if err := read(file, data, far); !errors.Is(err, syscall.EIO) {
							t.Errorf("read %d of the file: %v", i, err)
						}
						if _, err := os.ReadDir(m.latest(other, "files")); !errors.Is(err, syscall.EIO) {
							t.Errorf("read %d of what was not open: %v", i, err)
						}
					})
				}
				readers.Wait()
				if err := near(); err != nil {
					t.Errorf("read %d of what was read before: %v", i, err)
				}
			}
			faults.Clear()
			close(hold)
			if err := inTime(func() error { return errors.Join(read(img, disk, at), read(file, data, far)) }); err != nil {
				t.Error(err)
			}
			var names []os.DirEntry
			err := inTime(func() (err error) {
				names, err = os.ReadDir(m.latest(other, "files"))
				return err
			})
			if err != nil || len(names) != 2 || !strings.Contains(names[0].Name(), "data") {
				t.Errorf("%v, %v", names, err)
			}
		})
	}
}

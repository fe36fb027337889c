package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// bench is the state of a run.
type bench struct {
	cfg     config
	disk    string  // 4 GiB ext4 with about 2 GiB of files
	changes         // what a busy system changed of it
	pages   changes // what databases alone change: pages of existing files
	maker   string  // program that makes many points
	load    string  // before the run
	results []result
}

// changes is a later state of the disk.
type changes struct {
	changed string // the image
	extents string // the list of changes, in bytes
	really  int64  // bytes of pages that differ
}

const (
	diskBytes = 4 << 30
	fileBytes = 2 << 30
	pageBytes = 4096
)

// prepare makes the disk that all rows use.
func (b *bench) prepare() error {
	b.disk = filepath.Join(b.cfg.dir, "disk.img")
	if err := b.mkfs(); err != nil {
		return err
	}
	if err := b.mounted(b.disk, fillTree); err != nil {
		return err
	}
	var err error
	if b.changes, err = b.change("changed", churn); err != nil {
		return err
	}
	b.pages, err = b.change("pages", churnPages)
	return err
}

// change makes a copy of the disk, changes its files by do, and lists what differs.
func (b *bench) change(name string, do func(dir string) error) (changes, error) {
	c := changes{changed: filepath.Join(b.cfg.dir, name+".img"), extents: filepath.Join(b.cfg.dir, name+".jsonl")}
	if err := sh("cp", "--sparse=always", b.disk, c.changed); err != nil {
		return c, err
	}
	if err := b.mounted(c.changed, do); err != nil {
		return c, err
	}
	return c, b.listChanges(&c)
}

// buildMaker builds the program that makes many recovery points.
func (b *bench) buildMaker() error {
	b.maker = filepath.Join(b.cfg.dir, "makepoints")
	build := exec.Command("go", "build", "-o", b.maker, "./internal/makepoints")
	build.Dir = b.cfg.root
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build makepoints: %w: %s", err, out)
	}
	return nil
}

func (b *bench) mkfs() error {
	if err := os.WriteFile(b.disk, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(b.disk, diskBytes); err != nil {
		return err
	}
	return sh("mkfs.ext4", "-q", "-F", b.disk)
}

func (b *bench) mounted(image string, do func(dir string) error) error {
	dir := filepath.Join(b.cfg.dir, "mnt")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := sh("mount", "-o", "loop", image, dir); err != nil {
		return err
	}
	err := do(dir)
	return errors.Join(err, sh("umount", dir))
}

// fillTree copies programs, libraries and documents of this machine until the
// disk holds enough.
func fillTree(dir string) error {
	left := int64(fileBytes)
	errFull := errors.New("full")
	for _, root := range []string{"/usr/bin", "/usr/share", "/usr/include", "/usr/lib", "/usr/local", "/usr/sbin"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil //nolint:nilerr // what cannot be listed is not needed
			}
			st, err := d.Info()
			if err != nil || st.Size() > 256<<20 {
				return nil //nolint:nilerr // likewise
			}
			if left -= st.Size(); left < 0 {
				return errFull
			}
			return copyFile(path, filepath.Join(dir, path))
		})
		if errors.Is(err, errFull) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	// On a small machine the rest is generated, half of it compressible.
	rng := rand.New(rand.NewPCG(1, 1))
	for n := 0; left > 0; n++ {
		p := make([]byte, 32<<20)
		for i := range len(p) / 2 {
			p[i] = byte(rng.Uint32())
		}
		for i := len(p) / 2; i < len(p); i++ {
			p[i] = byte(rng.IntN(16))
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("filler", n)), p, 0o600); err != nil {
			return err
		}
		left -= int64(len(p))
	}
	return nil
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return nil
	}
	defer src.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// churn changes about one percent of the files' bytes as a busy system does:
// small writes into some large files, new files, deleted ones.
func churn(dir string) error {
	rng := rand.New(rand.NewPCG(7, 7))
	large, all, err := filesOf(dir)
	if err != nil {
		return err
	}
	page := make([]byte, pageBytes)
	for range 40 { // databases: 100 pages here and there in one file
		f, err := os.OpenFile(large[rng.IntN(len(large))], os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		st, err := f.Stat()
		if err != nil {
			return err
		}
		for range 100 {
			fillPage(rng, page)
			if _, err := f.WriteAt(page, rng.Int64N(st.Size()/pageBytes)*pageBytes); err != nil {
				return err
			}
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	for i := range 200 { // logs and documents: new files
		fillPage(rng, page)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("new", i)), bytes.Repeat(page, 1+rng.IntN(40)), 0o600); err != nil {
			return err
		}
	}
	for range 50 {
		if err := os.Remove(all[rng.IntN(len(all))]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// churnPages writes into some large files as databases do, and changes nothing
// else: runs of one to ten pages, such as neighbouring leaves of an index, at 40
// places of each of 40 files.
func churnPages(dir string) error {
	rng := rand.New(rand.NewPCG(8, 8))
	large, _, err := filesOf(dir)
	if err != nil {
		return err
	}
	page := make([]byte, pageBytes)
	for range 40 {
		f, err := os.OpenFile(large[rng.IntN(len(large))], os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		st, err := f.Stat()
		if err != nil {
			return err
		}
		for range 40 {
			n := 1 + rng.Int64N(10)
			at := rng.Int64N(st.Size()/pageBytes - n)
			for i := range n {
				fillPage(rng, page)
				if _, err := f.WriteAt(page, (at+i)*pageBytes); err != nil {
					return err
				}
			}
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// fillPage writes an eighth of noise, the rest of few letters: it compresses to
// about half, as what databases and logs write does.
func fillPage(rng *rand.Rand, page []byte) {
	for i := range page {
		page[i] = byte('a' + rng.IntN(16)*rng.IntN(2))
		if i < len(page)/8 {
			page[i] = byte(rng.Uint32())
		}
	}
}

// filesOf lists the regular files below dir, and those of more than 1 MiB.
func filesOf(dir string) (large, all []string, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		if st.Size() > 1<<20 {
			large = append(large, path)
		}
		all = append(all, path)
		return nil
	})
	return large, all, err
}

// listChanges compares the two disks and writes the list of extents.
func (b *bench) listChanges(c *changes) error {
	old, err := os.Open(b.disk)
	if err != nil {
		return err
	}
	defer old.Close()
	now, err := os.Open(c.changed)
	if err != nil {
		return err
	}
	defer now.Close()
	out, err := os.Create(c.extents)
	if err != nil {
		return err
	}
	defer out.Close()
	enc := json.NewEncoder(out)
	head := map[string]any{"format": "varve-extents/1", "base": "snap-1", "target": "snap-2", "size": diskBytes}
	if err := enc.Encode(head); err != nil {
		return err
	}
	const chunk = 4 << 20
	p, q := make([]byte, chunk), make([]byte, chunk)
	count := 0
	for off := int64(0); off < diskBytes; off += chunk {
		if _, err := old.ReadAt(p, off); err != nil {
			return err
		}
		if _, err := now.ReadAt(q, off); err != nil {
			return err
		}
		for i := 0; i < chunk; i += pageBytes {
			if !bytes.Equal(p[i:i+pageBytes], q[i:i+pageBytes]) {
				count++
				c.really += pageBytes
				if err := enc.Encode(map[string]int64{"offset": off + int64(i), "length": pageBytes}); err != nil {
					return err
				}
			}
		}
	}
	return enc.Encode(map[string]any{"end": true, "count": count})
}

// fullList is a list of extents that names the whole disk, for a full whose
// change ID the increment builds on.
func (b *bench) fullList() (string, error) {
	path := filepath.Join(b.cfg.dir, "full.jsonl")
	text := fmt.Sprintf(`{"format":"varve-extents/1","base":null,"target":"snap-1","size":%d}`+"\n"+
		`{"offset":0,"length":%d}`+"\n"+`{"end":true,"count":1}`+"\n", int64(diskBytes), int64(diskBytes))
	return path, os.WriteFile(path, []byte(text), 0o600)
}

func sh(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w: %s", name, args, err, out)
	}
	return nil
}

// settle writes back dirty data, so that one side does not wait for the other's writes.
func settle() { syscall.Sync() }

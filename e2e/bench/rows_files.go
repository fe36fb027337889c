package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	walkedFiles = 5000
	bigFile     = 300 << 20
	filesVolume = "bench/files"
	filesLatest = filesVolume + "@latest"
	largeVolume = "bench/large"
)

// fileRows measure how files inside a recovery point are reached.
func fileRows(b *bench) ([]result, error) {
	s, err := b.newSite()
	if err != nil {
		return nil, err
	}
	defer s.remove()
	image := filepath.Join(s.dir, "files.img")
	if err := errors.Join(sparse(image, 1<<30), sh("mkfs.ext4", "-q", "-F", image), b.mounted(image, fillFiles)); err != nil {
		return nil, err
	}
	if _, err := b.varve(s.conf, "backup", image, "--volume", filesVolume); err != nil {
		return nil, err
	}
	out, err := b.walkAndRead(s, image)
	if err != nil {
		return nil, err
	}
	running, err := b.runningMounts(s, image)
	if err != nil {
		return nil, err
	}
	first, err := b.firstListing(s)
	return append(append(out, running...), first...), err
}

// runningMounts compares reads through a mount of ours with reads through the kernel's. Both are mounted for each
// run, so that neither has read a file before, and only the reads are measured.
func (b *bench) runningMounts(s *site, image string) ([]result, error) {
	mnt, target := filepath.Join(s.dir, "mnt"), filepath.Join(s.dir, "target")
	read := func(work, root string) (sample, error) {
		_ = os.Remove(target)
		if err := sh("ls", root); err != nil { // which opens the file system
			return sample{}, err
		}
		settle()
		return b.exec("sh", "-c", work, root, target)
	}
	kernel := func(work string) func() (sample, error) {
		return func() (out sample, err error) {
			if err := sh("mount", "-o", "ro,loop", image, mnt); err != nil {
				return out, err
			}
			out, err = read(work, mnt)
			return out, errors.Join(err, sh("umount", mnt))
		}
	}
	ours := func(work string) func() (sample, error) {
		return func() (out sample, err error) {
			if _, err := b.varve(s.conf, "mount", mnt, "--daemon"); err != nil {
				return out, err
			}
			out, err = read(work, filepath.Join(mnt, filesVolume, "latest", "files"))
			_, umountErr := b.varve(s.conf, "umount", mnt)
			return out, errors.Join(err, umountErr)
		}
	}
	var out []result
	for _, c := range []struct{ what, work, why string }{
		{
			fmt.Sprintf("list %d files in a running mount: find -printf of size and time", walkedFiles), `find "$0"/many -printf '%s %t %p\n'`,
			"the directory is parsed, and sent to the kernel in pieces",
		},
		{
			fmt.Sprintf("list %d files in a running mount: ls -lR", walkedFiles), `ls -lR "$0"/many`,
			"ls asks for the access list of each file, which is a request to the server, and the kernel does not remember that there is none",
		},
		{
			fmt.Sprintf("cp of a file of %d MB in a running mount", bigFile>>20), `cp "$0"/big "$1"`,
			"blocks are decoded, and each read goes through the kernel to the server and back",
		},
	} {
		a, p, err := b.pair(ours(c.work), kernel(c.work))
		if err != nil {
			return nil, err
		}
		r := slower(c.what, "kernel: loop mount of the raw image", atMost(2, "<= 2 x its time"), c.why, a, p)
		r.cpu = "" // the server's is not the command's
		out = append(out, r)
	}
	return out, nil
}

// fillFiles makes a directory of many files and one large file of this machine's
// programs and libraries.
func fillFiles(dir string) error {
	many := filepath.Join(dir, "many")
	if err := os.Mkdir(many, 0o755); err != nil {
		return err
	}
	for i := range walkedFiles {
		if err := os.WriteFile(filepath.Join(many, fmt.Sprintf("file-%05d", i)), fmt.Appendf(nil, "content of %d\n", i), 0o644); err != nil {
			return err
		}
	}
	big, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		return err
	}
	left := int64(bigFile)
	errFull := errors.New("full")
	for left > 0 {
		before := left
		err := filepath.WalkDir("/usr/lib", func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil //nolint:nilerr // what cannot be listed is not needed
			}
			p, err := os.ReadFile(path)
			if err != nil {
				return nil //nolint:nilerr // likewise
			}
			p = p[:min(int64(len(p)), left)]
			left -= int64(len(p))
			if _, err := big.Write(p); err != nil {
				return err
			}
			if left == 0 {
				return errFull
			}
			return nil
		})
		if err != nil && !errors.Is(err, errFull) {
			return errors.Join(err, big.Close())
		}
		if left == before {
			return errors.Join(errors.New("/usr/lib has no files to fill the disk with"), big.Close())
		}
	}
	return big.Close()
}

// walkAndRead compares whole commands: ours against mount, the work, umount.
func (b *bench) walkAndRead(s *site, image string) ([]result, error) {
	mnt, target := filepath.Join(s.dir, "mnt"), filepath.Join(s.dir, "target")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		return nil, err
	}
	kernel := func(work string) func() (sample, error) {
		script := fmt.Sprintf("mount -o ro,loop %q %q && %s; status=$?; umount %q && exit $status", image, mnt, work, mnt)
		return func() (sample, error) {
			_ = os.Remove(target)
			return b.exec("sh", "-c", script)
		}
	}
	ours := func(args ...string) func() (sample, error) {
		return func() (sample, error) {
			_ = os.Remove(target)
			return b.varve(s.conf, args...)
		}
	}
	var out []result
	for _, c := range []struct {
		work, why  string
		ours, peer func() (sample, error)
	}{
		{
			fmt.Sprintf("walk %d files: varve ls -R", walkedFiles),
			"opening the repository is a floor: the key derived from the password (scrypt) alone takes 0.15 s of CPU",
			ours("ls", "-R", filesLatest+":/many"), kernel(fmt.Sprintf("ls -lR %q/many", mnt)),
		},
		{
			fmt.Sprintf("read a file of %d MB: varve cp", bigFile>>20),
			"opening the repository and decoding take CPU that the kernel does not need",
			ours("cp", filesLatest+":/big", target), kernel(fmt.Sprintf("cp %q/big %q", mnt, target)),
		},
	} {
		for _, run := range []func() (sample, error){c.ours, c.peer} { // page cache
			if _, err := run(); err != nil {
				return nil, err
			}
		}
		a, p, err := b.pair(c.ours, c.peer)
		if err != nil {
			return nil, err
		}
		out = append(out, slower(c.work, "kernel: loop mount of the raw image, ls -lR or cp, umount", atMost(3, "<= 3 x its time"), c.why, a, p))
	}
	return out, nil
}

// firstListing is the time from the command to the first list of files of a volume of
// 1 TiB, and what was fetched for it.
func (b *bench) firstListing(s *site) ([]result, error) {
	image := filepath.Join(s.dir, "large.img")
	if err := errors.Join(sparse(image, 1<<40), sh("mkfs.ext4", "-q", "-F", "-E", "nodiscard", image), b.mounted(image, func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "hello"), []byte("hello"), 0o644)
	})); err != nil {
		return nil, err
	}
	if _, err := b.varve(s.conf, "backup", image, "--volume", largeVolume); err != nil {
		return nil, err
	}
	mnt := filepath.Join(s.dir, "tree")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		return nil, err
	}
	point := filepath.Join(mnt, largeVolume, "latest")
	var fetched int64
	mounted := func() (sample, error) {
		start := time.Now()
		run, err := b.varve(s.conf, "mount", mnt, "--daemon")
		if err != nil {
			return run, err
		}
		list, err := os.ReadDir(filepath.Join(point, "files"))
		run.wall = time.Since(start)
		var info struct{ Fetched struct{ Bytes int64 } }
		text, readErr := os.ReadFile(filepath.Join(point, "info.json"))
		_, umountErr := b.varve(s.conf, "umount", mnt)
		if err := errors.Join(err, readErr, umountErr); err != nil {
			return run, err
		}
		if err := json.Unmarshal(text, &info); err != nil {
			return run, err
		}
		fetched = info.Fetched.Bytes
		for _, e := range list {
			if e.Name() == "hello" {
				return run, nil
			}
		}
		return run, fmt.Errorf("%s/files has %d entries, and not what was written", point, len(list))
	}
	ls := func() (sample, error) {
		run, err := b.varve(s.conf, "ls", largeVolume+"@latest")
		if err == nil && !strings.Contains(string(run.stdout), "hello") {
			err = fmt.Errorf("varve ls shows\n%s", run.stdout)
		}
		return run, err
	}
	a, p, err := b.pair(mounted, ls)
	if err != nil {
		return nil, err
	}
	const work, why = "first list of files of an ext4 volume of 1 TiB, from the command on: ", "the machine was busy"
	g := atMost(1, "< 1 s")
	x, y := medianOf(a, wallOf), medianOf(p, wallOf)
	return []result{
		single(work+"varve mount --daemon, then ls", seconds(x), x, g, why),
		single(work+"varve ls", seconds(y), y, g, why),
		single("bytes fetched for it", megabytes(fetched), float64(fetched)/1e6, atMost(16, "<= 16 MB"),
			"the journal's and the group descriptors' blocks"),
	}, nil
}

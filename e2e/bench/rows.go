package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

type row struct {
	id  string
	run func(*bench) ([]result, error)
}

var allRows = []row{
	{"full", fullBackup},
	{"incremental", incrementalBackup},
	{"stored", storedBytes},
	{"metadata", metadataBytes},
	{"restore", restoreRows},
	{"memory", memoryRows},
	{"chain", chainRows},
	{"nbd", nbdRows},
}

// site is a fresh repository of each program.
type site struct {
	b           *bench
	dir         string
	varve, conf string
	stock       string
	stockConf   string
}

func (b *bench) newSite(splitter string, createArgs ...string) (*site, error) {
	dir, err := os.MkdirTemp(b.cfg.dir, "site-*")
	if err != nil {
		return nil, err
	}
	s := &site{
		b: b, dir: dir, varve: filepath.Join(dir, "varve"), conf: filepath.Join(dir, "varve.config"),
		stock: filepath.Join(dir, "kopia"), stockConf: filepath.Join(dir, "kopia.config"),
	}
	args := append([]string{"repo", "create", "filesystem", "--path", s.varve, "--compression", "zstd-fastest"}, createArgs...)
	if _, err := b.varve(s.conf, args...); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.stock, 0o700); err != nil {
		return nil, err
	}
	args = []string{"repository", "create", "filesystem", "--path=" + s.stock, "--cache-directory=" + filepath.Join(dir, "cache")}
	if splitter != "" {
		args = append(args, "--object-splitter="+splitter)
	}
	if _, err := b.kopia(s.stockConf, args...); err != nil {
		return nil, err
	}
	_, err = b.kopia(s.stockConf, "policy", "set", "--global", "--compression=zstd-fastest")
	return s, err
}

func (s *site) remove() { _ = os.RemoveAll(s.dir) }

// kopiaSave snapshots an image file; the file is always at one path, so that a
// second one is an increment of the first.
func (s *site) kopiaSave(image string) (time.Duration, error) {
	path := filepath.Join(s.dir, "disk.img")
	_ = os.Remove(path)
	if err := os.Link(image, path); err != nil {
		return 0, err
	}
	settle()
	r, err := s.b.kopia(s.stockConf, "snapshot", "create", path)
	return r.wall, err
}

func (s *site) save(image string, args ...string) (sample, error) {
	settle()
	return s.b.varve(s.conf, append([]string{"backup", image, "--volume", "bench/disk", "-o", "json"}, args...)...)
}

func fullBackup(b *bench) ([]result, error) {
	ours := func() (time.Duration, error) {
		s, err := b.newSite("")
		if err != nil {
			return 0, err
		}
		defer s.remove()
		r, err := s.save(b.disk)
		return r.wall, err
	}
	peer := func() (time.Duration, error) {
		s, err := b.newSite("")
		if err != nil {
			return 0, err
		}
		defer s.remove()
		return s.kopiaSave(b.disk)
	}
	if _, err := ours(); err != nil { // warm the page cache
		return nil, err
	}
	a, p, err := b.pair(ours, peer)
	if err != nil {
		return nil, err
	}
	return []result{timed("full backup of the disk", "kopia snapshot create", ">= 2 x", a, p)}, nil
}

func incrementalBackup(b *bench) ([]result, error) {
	full, err := b.fullList()
	if err != nil {
		return nil, err
	}
	ours := func() (time.Duration, error) {
		s, err := b.newSite("")
		if err != nil {
			return 0, err
		}
		defer s.remove()
		if _, err := s.save(b.disk, "--extents", full); err != nil {
			return 0, err
		}
		r, err := s.save(b.changed, "--extents", b.extents)
		return r.wall, err
	}
	peer := func() (time.Duration, error) {
		s, err := b.newSite("")
		if err != nil {
			return 0, err
		}
		defer s.remove()
		if _, err := s.kopiaSave(b.disk); err != nil {
			return 0, err
		}
		return s.kopiaSave(b.changed)
	}
	a, p, err := b.pair(ours, peer)
	if err != nil {
		return nil, err
	}
	work := fmt.Sprintf("incremental backup from a list of extents, %s changed, spot check included", megabytes(b.really))
	return []result{timed(work, "kopia snapshot create of the changed file", ">= 20 x", a, p)}, nil
}

// storedBytes compares what an increment adds to the repository. The peer is a
// flat table of 1 MiB entries, as Velero's block data mover writes it: stock Kopia
// with a fixed splitter stores the same contents and the same table.
func storedBytes(b *bench) ([]result, error) {
	s, err := b.newSite("FIXED-1M")
	if err != nil {
		return nil, err
	}
	defer s.remove()
	grown := func(dir string, first, second func() error) (int64, error) {
		if err := first(); err != nil {
			return 0, err
		}
		before, err := du(dir)
		if err != nil {
			return 0, err
		}
		if err := second(); err != nil {
			return 0, err
		}
		after, err := du(dir)
		return after - before, err
	}
	full, err := b.fullList()
	if err != nil {
		return nil, err
	}
	ours, err := grown(s.varve,
		func() error { _, err := s.save(b.disk, "--extents", full); return err },
		func() error { _, err := s.save(b.changed, "--extents", b.extents); return err })
	if err != nil {
		return nil, err
	}
	peer, err := grown(s.stock,
		func() error { _, err := s.kopiaSave(b.disk); return err },
		func() error { _, err := s.kopiaSave(b.changed); return err })
	if err != nil {
		return nil, err
	}
	return []result{sized(fmt.Sprintf("bytes stored by an increment, %s changed", megabytes(b.really)),
		"flat table of 1 MiB blocks", "<= 0.35 x", ours, peer)}, nil
}

func sized(work, peerName, goal string, ours, peer int64) result {
	return result{
		work: work, peerName: peerName, goal: goal, varve: megabytes(ours), peer: megabytes(peer),
		ratio: fmt.Sprintf("%.3f x", float64(ours)/float64(peer)),
	}
}

// metadataBytes measures an increment of one block on huge sparse disks.
func metadataBytes(b *bench) ([]result, error) {
	var out []result
	for _, tib := range []int64{1, 10} {
		s, err := b.newSite("")
		if err != nil {
			return nil, err
		}
		defer s.remove()
		image := filepath.Join(s.dir, "huge.img")
		if err := sparse(image, tib<<40); err != nil {
			return nil, err
		}
		if _, err := s.save(image); err != nil {
			return nil, err
		}
		before, err := du(s.varve)
		if err != nil {
			return nil, err
		}
		if err := poke(image, tib<<39); err != nil {
			return nil, err
		}
		r, err := s.save(image)
		if err != nil {
			return nil, err
		}
		after, err := du(s.varve)
		if err != nil {
			return nil, err
		}
		out = append(out, result{
			work: fmt.Sprintf("bytes stored by an increment of one block of 4 KiB of data, disk of %d TiB", tib), peerName: "flat table of 1 MiB blocks, computed",
			varve: fmt.Sprintf("%.3f MB", float64(after-before)/1e6), peer: fmt.Sprintf("%d MB of JSON", 75*tib),
			ratio: fmt.Sprintf("%.5f x", float64(after-before)/float64(tib*75e6)), goal: "<= 0.1 MB",
			note: fmt.Sprintf("compared by holes in %s, peak %s", seconds(r.wall), megabytes(r.rss)),
		})
	}
	return out, nil
}

func sparse(path string, size int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}

func poke(path string, off int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	p := make([]byte, pageBytes)
	for i := range p {
		p[i] = byte(i*7 + i>>8)
	}
	if _, err := f.WriteAt(p, off); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func restoreRows(b *bench) ([]result, error) {
	s, err := b.newSite("")
	if err != nil {
		return nil, err
	}
	defer s.remove()
	full, err := b.fullList()
	if err != nil {
		return nil, err
	}
	if _, err := s.save(b.disk, "--extents", full); err != nil {
		return nil, err
	}
	if _, err := s.save(b.changed, "--extents", b.extents); err != nil {
		return nil, err
	}
	if _, err := s.kopiaSave(b.changed); err != nil {
		return nil, err
	}
	root, err := s.kopiaRoot()
	if err != nil {
		return nil, err
	}
	target := filepath.Join(s.dir, "target.img")
	clean := func() { _ = os.Remove(target); settle() }
	ours := func() (time.Duration, error) {
		clean()
		r, err := b.varve(s.conf, "restore", "bench/disk@latest", target)
		return r.wall, err
	}
	stock := func(args ...string) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			clean()
			r, err := b.kopia(s.stockConf, append([]string{"snapshot", "restore", root, target}, args...)...)
			return r.wall, err
		}
	}
	var out []result
	for _, peer := range []struct {
		name, goal string
		run        func() (time.Duration, error)
	}{
		{"kopia snapshot restore", ">= 4 x", stock()},
		{"kopia snapshot restore, sparse", ">= 3 x", stock("--write-sparse-files")},
		{"dd of the same bytes, sparse", ">= 0.7 x when the CPU allows", func() (time.Duration, error) {
			clean()
			start := time.Now()
			err := sh("dd", "if="+b.changed, "of="+target, "bs=4M", "conv=sparse", "status=none")
			return time.Since(start), err
		}},
	} {
		a, p, err := b.pair(ours, peer.run)
		if err != nil {
			return nil, err
		}
		out = append(out, timed("full restore to a file", peer.name, peer.goal, a, p))
	}
	// Delta: the target holds the older point.
	older := func() error {
		clean()
		return sh("cp", "--sparse=always", b.disk, target)
	}
	for _, delta := range []struct {
		work, goal string
		args       []string
	}{
		{"delta restore with a known base, 1 % different", ">= 20 x", []string{"--delta", "--base", "bench/disk@latest~1"}},
		{"delta restore by comparing", ">= 2 x", []string{"--delta"}},
	} {
		run := func() (time.Duration, error) {
			if err := older(); err != nil {
				return 0, err
			}
			settle()
			r, err := b.varve(s.conf, append([]string{"restore", "bench/disk@latest", target}, delta.args...)...)
			return r.wall, err
		}
		a, p, err := b.pair(run, ours)
		if err != nil {
			return nil, err
		}
		out = append(out, timed(delta.work, "varve full restore", delta.goal, a, p))
	}
	return out, nil
}

func (s *site) kopiaRoot() (string, error) {
	r, err := s.b.kopia(s.stockConf, "snapshot", "list", "--all", "--json")
	if err != nil {
		return "", err
	}
	var list []struct {
		RootEntry struct {
			Obj string `json:"obj"`
		} `json:"rootEntry"`
	}
	if err := json.Unmarshal(r.stdout, &list); err != nil || len(list) == 0 {
		return "", fmt.Errorf("kopia snapshot list: %d snapshots: %w", len(list), err)
	}
	return list[len(list)-1].RootEntry.Obj, nil
}

// memoryRows give the peak resident set of whole processes.
func memoryRows(b *bench) ([]result, error) {
	s, err := b.newSite("")
	if err != nil {
		return nil, err
	}
	defer s.remove()
	const goal = "<= 300 MB beside the cache"
	line := func(work string, r sample) result {
		return result{work: "peak resident memory: " + work, varve: megabytes(r.rss), peerName: "none", peer: "-", ratio: "-", goal: goal}
	}
	image := filepath.Join(s.dir, "blocks.img")
	if err := sparse(image, 256<<30); err != nil {
		return nil, err
	}
	// 4 Mi blocks of 64 KiB, one in sixteen with data of its own.
	if err := dot(image, 1<<20, 256<<10); err != nil {
		return nil, err
	}
	r, err := s.save(image, "--block-size", "64K")
	if err != nil {
		return nil, err
	}
	out := []result{line("backup of 4 Mi blocks, 262,144 of them with data", r)}
	target := filepath.Join(s.dir, "target.img")
	if r, err = b.varve(s.conf, "restore", "bench/disk@latest", target); err != nil {
		return nil, err
	}
	return append(out, line("restore of the same", r)), nil
}

// dot writes count distinct short pieces of data, every step bytes.
func dot(path string, step int64, count int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for i := range count {
		if _, err := f.WriteAt(fmt.Appendf(nil, "block %d", i), i*step); err != nil {
			return err
		}
	}
	return nil
}

// chainRows compare a chain of many points with one of a single point over the
// same unique data.
func chainRows(b *bench) ([]result, error) {
	const points = 1000
	long, err := b.newSite("")
	if err != nil {
		return nil, err
	}
	defer long.remove()
	short, err := b.newSite("")
	if err != nil {
		return nil, err
	}
	defer short.remove()
	image := filepath.Join(long.dir, "chain.img")
	if err := sparse(image, 1<<30); err != nil {
		return nil, err
	}
	for i := range int64(points) {
		if err := poke(image, i<<20); err != nil {
			return nil, err
		}
		if _, err := b.varve(long.conf, "backup", image, "--volume", "bench/disk"); err != nil {
			return nil, err
		}
	}
	if _, err := b.varve(short.conf, "backup", image, "--volume", "bench/disk"); err != nil {
		return nil, err
	}
	timeOf := func(s *site, args ...string) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			settle()
			r, err := b.varve(s.conf, args...)
			return r.wall, err
		}
	}
	var out []result
	a, p, err := b.pair(timeOf(long, "maintenance", "run", "--full", "--safety", "none"), timeOf(short, "maintenance", "run", "--full", "--safety", "none"))
	if err != nil {
		return nil, err
	}
	r := timed(fmt.Sprintf("full maintenance, chain of %d", points), "chain of 1, same data", "<= 2 x its time", a, p)
	r.ratio = fmt.Sprintf("%.2f x its time", median(a).Seconds()/median(p).Seconds())
	out = append(out, r)
	a, p, err = b.pair(timeOf(long, "show", "bench/disk@latest"), timeOf(short, "show", "bench/disk@latest"))
	if err != nil {
		return nil, err
	}
	r = timed(fmt.Sprintf("whole process that opens the newest point, chain of %d", points), "chain of 1", "<= 1.1 x its time, beside opening the repository", a, p)
	r.ratio = fmt.Sprintf("%.2f x its time", median(a).Seconds()/median(p).Seconds())
	return append(out, r), nil
}

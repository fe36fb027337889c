package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

type row struct {
	id   string
	run  func(*bench) ([]result, error)
	disk bool // it uses the disk with files
}

var allRows = []row{
	{"full", fullBackup, true},
	{"incremental", incrementalBackup, true},
	{"stored", storedBytes, true},
	{"metadata", metadataBytes, false},
	{"restore", restoreRows, true},
	{"memory", memoryRows, false},
	{"chain", chainRows, false},
	{"crowd", crowdRows, false},
	{"nbd", nbdRows, true},
	{"serve", serveRows, false},
	{"files", fileRows, false},
	{"image", imageRows, true},
	{"far", farRows, false},
	{"living", livingRows, false},
	{"before", beforeRows, true},
}

const (
	sameCompressor = "zstd-fastest"
	volume         = "bench/disk"
	latest         = "bench/disk@latest"
)

// site is a fresh repository of each program.
type site struct {
	b           *bench
	dir         string
	varve, conf string
	stock       string
	stockConf   string
}

// newSite makes a repository of ours; createArgs choose its format.
func (b *bench) newSite(createArgs ...string) (*site, error) {
	dir, err := os.MkdirTemp(b.cfg.dir, "site-*")
	if err != nil {
		return nil, err
	}
	s := &site{
		b: b, dir: dir, varve: filepath.Join(dir, "varve"), conf: filepath.Join(dir, "varve.config"),
		stock: filepath.Join(dir, "kopia"), stockConf: filepath.Join(dir, "kopia.config"),
	}
	_, err = b.varve(s.conf, append([]string{"repo", "create", "filesystem", "--path", s.varve}, createArgs...)...)
	return s, err
}

// newPair makes one of each program, with the same compressor.
func (b *bench) newPair(splitter string) (*site, error) {
	s, err := b.newSite("--compression", sameCompressor)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.stock, 0o700); err != nil {
		return nil, err
	}
	args := []string{"repository", "create", "filesystem", "--path=" + s.stock, "--cache-directory=" + filepath.Join(s.dir, "cache")}
	if splitter != "" {
		args = append(args, "--object-splitter="+splitter)
	}
	if _, err := b.kopia(s.stockConf, args...); err != nil {
		return nil, err
	}
	_, err = b.kopia(s.stockConf, "policy", "set", "--global", "--compression="+sameCompressor)
	return s, err
}

func (s *site) remove() { _ = os.RemoveAll(s.dir) }

// kopiaSave snapshots an image file; the file is always at one path, so that a
// second one is an increment of the first.
func (s *site) kopiaSave(image string) (sample, error) {
	path := filepath.Join(s.dir, "disk.img")
	_ = os.Remove(path)
	if err := os.Link(image, path); err != nil {
		return sample{}, err
	}
	settle()
	return s.b.kopia(s.stockConf, "snapshot", "create", path)
}

func (s *site) save(image string, args ...string) (sample, error) {
	settle()
	return s.b.varve(s.conf, append([]string{"backup", image, "--volume", volume, "-o", "json"}, args...)...)
}

func fullBackup(b *bench) ([]result, error) {
	ours := func(createArgs ...string) func() (sample, error) {
		return func() (sample, error) {
			s, err := b.newSite(createArgs...)
			if err != nil {
				return sample{}, err
			}
			defer s.remove()
			return s.save(b.disk)
		}
	}
	peer := func() (sample, error) {
		s, err := b.newPair("")
		if err != nil {
			return sample{}, err
		}
		defer s.remove()
		return s.kopiaSave(b.disk)
	}
	same := ours("--compression", sameCompressor)
	if _, err := same(); err != nil { // warm the page cache
		return nil, err
	}
	g := atLeast(2, ">= 2 x")
	a, p, err := b.pair(same, peer)
	if err != nil {
		return nil, err
	}
	const why = "both run the same compressor on all CPUs, and it is most of the work: the next row, with s2 instead, takes half the CPU time"
	out := []result{faster("full backup of the disk, same compressor", "kopia snapshot create", g, why, a, p)}
	a, p, err = b.pair(ours(), peer)
	if err != nil {
		return nil, err
	}
	return append(out, faster("full backup of the disk, defaults of repo create (s2)", "kopia snapshot create", g,
		"the machine had less CPU free than the peer found in its turn", a, p)), nil
}

func incrementalBackup(b *bench) ([]result, error) {
	full, err := b.fullList()
	if err != nil {
		return nil, err
	}
	// Each run is an increment of the same state, so the repositories are made again.
	ours := func(createArgs ...string) func() (sample, error) {
		return func() (sample, error) {
			s, err := b.newSite(createArgs...)
			if err != nil {
				return sample{}, err
			}
			defer s.remove()
			if _, err := s.save(b.disk, "--extents", full); err != nil {
				return sample{}, err
			}
			return s.save(b.changed, "--extents", b.extents)
		}
	}
	peer := func() (sample, error) {
		s, err := b.newPair("")
		if err != nil {
			return sample{}, err
		}
		defer s.remove()
		if _, err := s.kopiaSave(b.disk); err != nil {
			return sample{}, err
		}
		return s.kopiaSave(b.changed)
	}
	work := fmt.Sprintf("incremental backup from a list of extents, %s changed, spot check included", megabytes(b.really))
	var out []result
	for _, c := range []struct {
		work       string
		createArgs []string
	}{
		{work + ", same compressor", []string{"--compression", sameCompressor}},
		{work + ", defaults of repo create (s2)", nil},
	} {
		a, p, err := b.pair(ours(c.createArgs...), peer)
		if err != nil {
			return nil, err
		}
		out = append(out, faster(c.work, "kopia snapshot create of the changed file", atLeast(12, ">= 12 x"),
			"a changed page costs reading, hashing and compressing its block of 128 KiB, which is most of the CPU time; the key derived from the password (scrypt, 0.15 s of CPU) and the syncs of three flushes are a floor that does not shrink with the change", a, p))
	}
	return out, nil
}

// storedBytes compares what an increment adds to the repository. The peer is a
// flat table of 1 MiB entries, as Velero's block data mover writes it: stock Kopia
// with a fixed splitter stores the same contents and the same table.
func storedBytes(b *bench) ([]result, error) {
	s, err := b.newPair("FIXED-1M")
	if err != nil {
		return nil, err
	}
	defer s.remove()
	full, err := b.fullList()
	if err != nil {
		return nil, err
	}
	first, err := s.save(b.disk, "--extents", full)
	if err != nil {
		return nil, err
	}
	var point struct{ ID string }
	if err := json.Unmarshal(first.stdout, &point); err != nil {
		return nil, fmt.Errorf("varve backup: %w", err)
	}
	if _, err := s.kopiaSave(b.disk); err != nil {
		return nil, err
	}
	var out []result
	for _, c := range []struct {
		changes

		what, why string
	}{
		{b.changes, "new and deleted files and pages far apart", "a changed page costs a block of 128 KiB here and one of 1 MiB there, but new files, whose pages lie together, cost the same on both sides"},
		{b.pages, "pages of databases alone, in runs of one to ten", "a changed page costs a block of 128 KiB here and one of 1 MiB there, so the ratio depends on how far apart the changes lie"},
	} {
		ours, err := grown(s.varve, func() error {
			_, err := s.save(c.changed, "--extents", c.extents, "--parent", point.ID)
			return err
		})
		if err != nil {
			return nil, err
		}
		// A block that another increment stored is not stored again, but the two
		// have next to none in common.
		peer, err := grown(s.stock, func() error { _, err := s.kopiaSave(c.changed); return err })
		if err != nil {
			return nil, err
		}
		x, g := float64(ours)/float64(peer), atMost(0.35, "<= 0.35 x")
		out = append(out, result{
			work: fmt.Sprintf("bytes stored by an increment, %s changed: %s", megabytes(c.really), c.what), peerName: "flat table of 1 MiB blocks",
			varve: megabytes(ours), peer: megabytes(peer), ratio: fmt.Sprintf("%.2f x", x), goal: g, reached: g.reached(x), why: c.why,
		})
	}
	return out, nil
}

// grown returns how many bytes a repository grows by while do runs.
func grown(dir string, do func() error) (int64, error) {
	before, err := du(dir)
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := du(dir)
	return after - before, err
}

// metadataBytes measures an increment of one page on huge sparse disks.
func metadataBytes(b *bench) ([]result, error) {
	var out []result
	for _, tib := range []int64{1, 10} {
		r, err := b.metadataOf(tib)
		if err != nil {
			return nil, err
		}
		out = append(out, r...)
	}
	return out, nil
}

func (b *bench) metadataOf(tib int64) ([]result, error) {
	s, err := b.newSite("--compression", sameCompressor)
	if err != nil {
		return nil, err
	}
	defer s.remove()
	size := tib << 40
	if _, err := b.points(s, "-size", fmt.Sprint(size), "-pages", "1000", "-points", "1"); err != nil {
		return nil, err
	}
	before, err := du(s.varve)
	if err != nil {
		return nil, err
	}
	run, err := b.points(s, "-size", fmt.Sprint(size), "-pages", "1000", "-points", "2")
	if err != nil {
		return nil, err
	}
	after, err := du(s.varve)
	if err != nil {
		return nil, err
	}
	// The second process made an empty increment and one of one page.
	stored := after - before
	g := atMost(0.1, "<= 0.1 MB")
	out := []result{{
		work:     fmt.Sprintf("bytes stored by an increment of nothing and one of a page of 4 KiB, together, simulated disk of %d TiB", tib),
		peerName: "flat table of 1 MiB blocks, computed", varve: fmt.Sprintf("%.3f MB", float64(stored)/1e6), peer: fmt.Sprintf("%d MB of JSON", 75*tib),
		ratio: fmt.Sprintf("%.5f x", float64(stored)/float64(tib*75e6)), goal: g, reached: g.reached(float64(stored) / 1e6),
		why: "each increment writes the index of each touched segment and of its part of the root anew",
	}}
	mem := atMost(300, "<= 300 MB")
	out = append(out, single(fmt.Sprintf("peak resident memory: backup of that disk of %d TiB", tib), megabytes(run.rss), float64(run.rss)/1e6, mem, "the lists of blocks and the builder's state"))
	first, run, err := b.firstByte(s, "bench/disk0@latest", 0)
	if err != nil {
		return nil, err
	}
	out = append(out, single(fmt.Sprintf("peak resident memory: open of that point of %d TiB", tib), megabytes(run.rss), float64(run.rss)/1e6, mem, "the index of the repository"),
		single(fmt.Sprintf("open to first byte of that point of %d TiB, running process", tib), seconds(first), first, atMost(0.05, "< 50 ms"), "the machine was busy"))
	return out, nil
}

func sparse(path string, size int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}

// memoryRows give the peak resident set of whole processes.
func memoryRows(b *bench) ([]result, error) {
	s, err := b.newSite("--compression", sameCompressor)
	if err != nil {
		return nil, err
	}
	defer s.remove()
	g := atMost(300, "<= 300 MB")
	image := filepath.Join(s.dir, "blocks.img")
	if err := sparse(image, 256<<30); err != nil {
		return nil, err
	}
	// 4 Mi blocks of 64 KiB, one in 32 with unique data.
	const dots = 128 << 10
	if err := dot(image, 2<<20, dots); err != nil {
		return nil, err
	}
	r, err := s.save(image, "--block-size", "64K")
	if err != nil {
		return nil, err
	}
	line := func(work string, r sample) result {
		return single("peak resident memory: "+work, megabytes(r.rss), float64(r.rss)/1e6, g,
			"Kopia holds an entry for each content until a flush, and its index in memory (34 bytes for each content)")
	}
	out := []result{line(fmt.Sprintf("backup of 4 Mi blocks, %d of them with data", dots), r)}
	r, err = b.varve(s.conf, "restore", latest, filepath.Join(s.dir, "target.img"))
	if err != nil {
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

func (s *site) kopiaRoot() (string, error) { return s.kopiaRootOf(s.stockConf, "") }

// kopiaRootOf returns the root of the last snapshot of a repository whose path ends with suffix.
func (s *site) kopiaRootOf(conf, suffix string) (string, error) {
	r, err := s.b.kopia(conf, "snapshot", "list", "--all", "--json")
	if err != nil {
		return "", err
	}
	var list []struct {
		Source    struct{ Path string } `json:"source"`
		RootEntry struct {
			Obj string `json:"obj"`
		} `json:"rootEntry"`
	}
	if err := json.Unmarshal(r.stdout, &list); err != nil {
		return "", fmt.Errorf("kopia snapshot list: %w", err)
	}
	for _, sn := range slices.Backward(list) {
		if strings.HasSuffix(sn.Source.Path, suffix) {
			return sn.RootEntry.Obj, nil
		}
	}
	return "", fmt.Errorf("kopia snapshot list: none of %d snapshots is of %q", len(list), suffix)
}

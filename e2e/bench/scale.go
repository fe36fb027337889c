package main

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// scale measures how the cost of the common operations grows, and writes the curves into the report.
func (b *bench) scale(report string) error {
	host, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	method := fmt.Sprintf(`Written by "make bench-scale" on %s: %d CPUs, Linux %s, %s. Medians of %d runs. Values have a
logarithmic scale, so that what does not depend on what grows is level; the bars of the text are in proportion.
A process of its own includes the CPU to derive the key, 0.15 to 0.3 s.
`, time.Now().UTC().Format("2006-01-02"), runtime.NumCPU(), strings.TrimSpace(string(host)), runtime.Version(), b.cfg.runs)
	for _, measure := range []struct {
		id  string
		run func() ([]curve, error)
	}{
		{"volume", b.overVolume}, {"chain", b.overChain}, {"changed", b.overChanged},
		{"points", b.overPoints}, {"clients", b.overClients}, {"latency", b.overLatency},
	} {
		if len(b.cfg.rows) > 0 && !b.cfg.rows[measure.id] {
			continue
		}
		fmt.Fprintf(os.Stderr, "== curves over %s\n", measure.id)
		curves, err := measure.run()
		if err != nil {
			return fmt.Errorf("%s: %w", measure.id, err)
		}
		for _, c := range curves {
			fmt.Fprintf(os.Stderr, "%s\n%s\n", c.title, c.text())
		}
		if err := writeCurves(report, method, curves); err != nil {
			return err
		}
	}
	return nil
}

// some returns the median run of a piece of work.
func (b *bench) some(run func() (sample, error)) (wall, rss float64, err error) {
	all := make([]sample, b.cfg.runs)
	for i := range all {
		settle()
		if all[i], err = run(); err != nil {
			return 0, 0, err
		}
	}
	return medianOf(all, wallOf), medianOf(all, func(s sample) float64 { return float64(s.rss) }), nil
}

func bytesOf(v float64) string { return megabytes(int64(v)) }

// grownDisk is an image with a repository of its points, and lists of what is written to it.
type grownDisk struct {
	*site
	image string
	size  int64
	state int
}

func (b *bench) newGrownDisk(size int64) (*grownDisk, error) {
	s, err := b.newSite()
	if err != nil {
		return nil, err
	}
	d := &grownDisk{site: s, image: filepath.Join(s.dir, "disk.img"), size: size}
	return d, sparse(d.image, size)
}

// write fills runs of run bytes with noise, apart bytes from one to the next, and backs the disk up by the list of them.
func (d *grownDisk) write(runs, run, apart int64) (sample, error) {
	d.state++
	base := "null"
	if d.state > 1 {
		base = fmt.Sprintf(`"state-%d"`, d.state-1)
	}
	var list strings.Builder
	fmt.Fprintf(&list, `{"format":"varve-extents/1","base":%s,"target":"state-%d","size":%d}`+"\n", base, d.state, d.size)
	f, err := os.OpenFile(d.image, os.O_WRONLY, 0)
	if err != nil {
		return sample{}, err
	}
	noise := rand.NewChaCha8([32]byte{byte(d.state), byte(d.state >> 8), 2})
	p := make([]byte, run)
	for i := range runs {
		_, _ = noise.Read(p)
		if _, err := f.WriteAt(p, i*apart); err != nil {
			return sample{}, errors.Join(err, f.Close())
		}
		fmt.Fprintf(&list, `{"offset":%d,"length":%d}`+"\n", i*apart, run)
	}
	fmt.Fprintf(&list, `{"end":true,"count":%d}`+"\n", runs)
	if err := f.Close(); err != nil {
		return sample{}, err
	}
	extents := filepath.Join(d.dir, "extents.jsonl")
	if err := os.WriteFile(extents, []byte(list.String()), 0o600); err != nil {
		return sample{}, err
	}
	return d.save(d.image, "--extents", extents)
}

// overVolume: 1000 pages with data on disks of any size.
func (b *bench) overVolume() ([]curve, error) {
	const pages = 1000
	seconds, memory := &curve{
		id: "volume-time", title: "Time over the size of the volume", over: "size",
		note: fmt.Sprintf("Sparse disks with %d pages of data. The increment is of one page, by a list of extents.", pages),
	}, &curve{
		id: "volume-memory", title: "Memory over the size of the volume", over: "size",
		note: "Peak resident memory of the same processes.",
	}
	var increment, show, first, incrementMemory, openMemory []float64
	for _, step := range []struct {
		name string
		size int64
	}{{"1 GiB", 1 << 30}, {"10 GiB", 10 << 30}, {"100 GiB", 100 << 30}, {"1 TiB", 1 << 40}, {"10 TiB", 10 << 40}} {
		d, err := b.newGrownDisk(step.size)
		if err != nil {
			return nil, err
		}
		if _, err := d.write(pages, pageBytes, step.size/pages/pageBytes*pageBytes); err != nil {
			return nil, err
		}
		wall, rss, err := b.some(func() (sample, error) { return d.write(1, pageBytes, 0) })
		if err != nil {
			return nil, err
		}
		increment, incrementMemory = append(increment, wall), append(incrementMemory, rss)
		if wall, _, err = b.some(func() (sample, error) { return b.varve(d.conf, "show", latest) }); err != nil {
			return nil, err
		}
		show = append(show, wall)
		byteOf, run, err := b.firstByte(d.site, latest, 0)
		if err != nil {
			return nil, err
		}
		first, openMemory = append(first, byteOf), append(openMemory, float64(run.rss))
		seconds.steps, memory.steps = append(seconds.steps, step.name), append(memory.steps, step.name)
		d.remove()
	}
	seconds.add("increment of one page", secondsText, increment)
	seconds.add("varve show of a point", secondsText, show)
	seconds.add("first byte, running process", secondsText, first)
	memory.add("increment of one page", bytesOf, incrementMemory)
	memory.add("open of a point", bytesOf, openMemory)
	return []curve{*seconds, *memory}, nil
}

// secondsText is seconds, for a line.
func secondsText(v float64) string { return seconds(v) }

// overChain: a point at the end of any number of increments.
func (b *bench) overChain() ([]curve, error) {
	c := &curve{
		id: "chain", title: "Time over the length of the history", over: "points",
		note: "A volume of 1 GiB of which each point changed one page, without maintenance until the last line, which is the second full maintenance.",
	}
	var first, show, maintenance []float64
	for _, points := range []int{1, 10, 100, 1000} {
		s, err := b.newSite()
		if err != nil {
			return nil, err
		}
		if _, err := b.points(s, "-points", fmt.Sprint(points)); err != nil {
			return nil, err
		}
		at, _, err := b.firstByte(s, "bench/disk0@latest", 0)
		if err != nil {
			return nil, err
		}
		wall, _, err := b.some(func() (sample, error) { return b.varve(s.conf, "show", "bench/disk0@latest") })
		if err != nil {
			return nil, err
		}
		first, show = append(first, at), append(show, wall)
		maintain := func() (sample, error) {
			return b.varve(s.conf, "maintenance", "run", "--full", "--safety", "none")
		}
		if _, err := maintain(); err != nil {
			return nil, err
		}
		if wall, _, err = b.some(maintain); err != nil {
			return nil, err
		}
		maintenance = append(maintenance, wall)
		c.steps = append(c.steps, fmt.Sprint(points))
		s.remove()
	}
	c.add("first byte, running process", secondsText, first)
	c.add("varve show of the last point", secondsText, show)
	c.add("full maintenance", secondsText, maintenance)
	return []curve{*c}, nil
}

// overChanged: increments of more and more bytes.
func (b *bench) overChanged() ([]curve, error) {
	const size = 4 << 30
	seconds, stored := &curve{
		id: "changed-time", title: "Time of an increment over what changed", over: "changed",
		note: "A disk of 4 GiB, 2 GiB of it data that does not compress; increments by a list of extents, the spot check included. Far apart: each page of 4 KiB in a block of 128 KiB of its own.",
	}, &curve{
		id: "changed-bytes", title: "Bytes stored by an increment over what changed", over: "changed",
		note: "The same increments: by how much the repository grew.",
	}
	d, err := b.newGrownDisk(size)
	if err != nil {
		return nil, err
	}
	defer d.remove()
	const block = 128 << 10
	if _, err := d.write(2<<30/block, block, block); err != nil {
		return nil, err
	}
	var one, far, oneStored, farStored []float64
	for _, step := range []struct {
		name string
		n    int64
	}{{"4 KiB", 4 << 10}, {"64 KiB", 64 << 10}, {"1 MiB", 1 << 20}, {"8 MiB", 8 << 20}, {"64 MiB", 64 << 20}, {"512 MiB", 512 << 20}} {
		seconds.steps, stored.steps = append(seconds.steps, step.name), append(stored.steps, step.name)
		for _, kind := range []struct {
			times, bytes *[]float64
			runs, run    int64
		}{{&one, &oneStored, 1, step.n}, {&far, &farStored, step.n / pageBytes, pageBytes}} {
			if kind.runs*block > 2<<30 {
				*kind.times, *kind.bytes = append(*kind.times, math.NaN()), append(*kind.bytes, math.NaN())
				continue
			}
			var grew []float64
			wall, _, err := b.some(func() (run sample, err error) {
				n, err := grown(d.varve, func() (err error) { run, err = d.write(kind.runs, kind.run, block); return err })
				grew = append(grew, float64(n))
				return run, err
			})
			if err != nil {
				return nil, err
			}
			slices.Sort(grew)
			*kind.times, *kind.bytes = append(*kind.times, wall), append(*kind.bytes, grew[len(grew)/2])
		}
	}
	seconds.add("in one run", secondsText, one)
	seconds.add("pages far apart", secondsText, far)
	stored.add("in one run", bytesOf, oneStored)
	stored.add("pages far apart", bytesOf, farStored)
	return []curve{*seconds, *stored}, nil
}

// overPoints: a repository with more and more points.
func (b *bench) overPoints() ([]curve, error) {
	seconds, memory := &curve{
		id: "points-time", title: "Time over the number of recovery points", over: "points",
		note: "Up to 100 volumes; the index blobs are merged, as they are after a day.",
	}, &curve{
		id: "points-memory", title: "Memory of a server over the number of recovery points", over: "points",
		note: "Peak resident memory of varve serve once all exports were listed and one was read.",
	}
	var list, ready, rss []float64
	for _, points := range []int{10, 100, 1000, 10_000} {
		s, err := b.newSite()
		if err != nil {
			return nil, err
		}
		if _, err := b.points(s, "-points", fmt.Sprint(points), "-volumes", fmt.Sprint(min(points, 100)), "-size", fmt.Sprint(64<<20), "-quick", "-once"); err != nil {
			return nil, err
		}
		wall, _, err := b.some(func() (sample, error) { return b.varve(s.conf, "list", "-o", "json") })
		if err != nil {
			return nil, err
		}
		list = append(list, wall)
		wall, peak, err := b.some(func() (sample, error) {
			r, err := s.serveOnce(points, "bench/disk1@latest")
			return sample{wall: secondsOf(r.opening + r.ready), rss: r.rss}, err
		})
		if err != nil {
			return nil, err
		}
		ready, rss = append(ready, wall), append(rss, peak)
		seconds.steps, memory.steps = append(seconds.steps, fmt.Sprint(points)), append(memory.steps, fmt.Sprint(points))
		s.remove()
	}
	seconds.add("varve list", secondsText, list)
	seconds.add("varve serve until ready", secondsText, ready)
	memory.add("varve serve", bytesOf, rss)
	return []curve{*seconds, *memory}, nil
}

// overClients: clients of one export.
func (b *bench) overClients() ([]curve, error) {
	rates, memory := &curve{
		id: "clients-rate", title: "Reads of 4 KiB a second over the number of clients", over: "clients",
		note: "Random reads of one export by fio, depth 16 for each client, which share the processors with the server. Cached: from 256 MiB. Not cached: over 4 GiB, half of it data, with a cache of 256 MiB.",
	}, &curve{
		id: "clients-memory", title: "Memory of a server over the number of clients", over: "clients",
		note: "Peak resident memory after these reads.",
	}
	d, err := b.newGrownDisk(4 << 30)
	if err != nil {
		return nil, err
	}
	defer d.remove()
	const block = 128 << 10
	if _, err := d.write(2<<30/block, block, 2*block); err != nil {
		return nil, err
	}
	c := &chain{site: d.site}
	var cached, missed, peak []float64
	for _, clients := range []int{1, 2, 4, 8, 16, 32, 64} {
		jobs := []string{fmt.Sprintf("--numjobs=%d", clients), "--group_reporting", "--thread", "--time_based", "--runtime=4", "--norandommap", "--randrepeat=0"}
		for _, kind := range []struct {
			into *[]float64
			warm bool
			set  []string
		}{{&cached, true, []string{"--size=256M"}}, {&missed, false, []string{"--size=4G"}}} {
			var all []sample
			for range b.cfg.runs {
				n, err := c.serveVarve("--cache-size", "256M")
				if err != nil {
					return nil, err
				}
				if kind.warm {
					err = readSet(n.uri, kind.set)
				}
				var rate float64
				if err == nil {
					rate, err = randomReads(n.uri, append(jobs, kind.set...)...)
				}
				var rss int64
				if err == nil {
					rss, err = peakMemory(n.cmd.Process.Pid)
				}
				if err := errors.Join(err, n.stop()); err != nil {
					return nil, err
				}
				all = append(all, sample{wall: secondsOf(rate), rss: rss})
			}
			*kind.into = append(*kind.into, medianOf(all, wallOf))
			if !kind.warm {
				peak = append(peak, medianOf(all, func(s sample) float64 { return float64(s.rss) }))
			}
		}
		rates.steps, memory.steps = append(rates.steps, fmt.Sprint(clients)), append(memory.steps, fmt.Sprint(clients))
	}
	rate := func(v float64) string { return fmt.Sprintf("%.0f /s", v) }
	rates.add("cached", rate, cached)
	rates.add("not cached", rate, missed)
	memory.add("varve serve", bytesOf, peak)
	return []curve{*rates, *memory}, nil
}

// overLatency: an object store that is farther and farther away.
func (b *bench) overLatency() ([]curve, error) {
	f, err := b.startFar()
	if err != nil {
		return nil, err
	}
	c, err := b.latencyCurve(f)
	return []curve{*c}, errors.Join(err, f.stop())
}

func (b *bench) latencyCurve(f *far) (*curve, error) {
	c := &curve{
		id: "latency", title: "Time over the latency of an object store", over: "a request",
		note: fmt.Sprintf("S3 behind a proxy that delays each request, nothing cached on the host; the restore is of %s that do not compress. Kopia's own snapshot of them has contents of about 4 MiB, where a block has 128 KiB.", megabytes(farBytes)),
	}
	s, err := b.newFarSite(f)
	if err != nil {
		return c, err
	}
	root, err := s.kopiaRoot()
	if err != nil {
		return c, err
	}
	point, err := s.kopiaRootOf(s.ours, "/"+path.Base(volume))
	if err != nil {
		return c, err
	}
	target := filepath.Join(s.dir, "restored")
	work := []struct {
		name string
		run  func() (sample, error)
	}{
		{"varve list", func() (sample, error) { return b.varve(s.conf, "list", volume) }},
		{"first byte over NBD", func() (sample, error) { return s.serveAnd("qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", "URI") }},
		{"increment of one page", s.listed},
		{"restore", func() (sample, error) { return b.varve(s.conf, "restore", latest, target) }},
		{"kopia, of the same point", func() (sample, error) { return b.kopia(s.ours, "snapshot", "restore", point, target) }},
		{"kopia, of its own snapshot", func() (sample, error) { return b.kopia(s.stockConf, "snapshot", "restore", root, target) }},
	}
	for _, w := range work {
		c.add(w.name, secondsText, nil)
	}
	for _, ms := range []int{0, 5, 10, 30, 100} {
		f.delay.Store(int64(time.Duration(ms) * time.Millisecond))
		c.steps = append(c.steps, fmt.Sprintf("%d ms", ms))
		for i, w := range work {
			wall, _, err := b.some(func() (sample, error) {
				s.cold()
				_ = os.RemoveAll(target)
				return w.run()
			})
			if err != nil {
				return c, err
			}
			c.lines[i].values = append(c.lines[i].values, wall)
		}
	}
	return c, nil
}

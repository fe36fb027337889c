package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
)

// points runs the maker of many recovery points.
func (b *bench) points(s *site, args ...string) (sample, error) {
	return b.exec(b.maker, append([]string{"-config", s.conf}, args...)...)
}

// firstByte opens a point many times in one running process and reads 4 KiB:
// the median, in seconds.
func (b *bench) firstByte(s *site, point string, offset int64) (float64, sample, error) {
	r, err := b.points(s, "-first-byte", point, "-offset", fmt.Sprint(offset))
	if err != nil {
		return 0, r, err
	}
	us, err := strconv.ParseFloat(string(bytes.TrimSpace(r.stdout)), 64)
	return us / 1e6, r, err
}

// chainRows compare a chain of many points with one of a single point over the
// same unique data.
func chainRows(b *bench) ([]result, error) {
	const points = 1000
	long, err := b.newSite()
	if err != nil {
		return nil, err
	}
	defer long.remove()
	short, err := b.newSite()
	if err != nil {
		return nil, err
	}
	defer short.remove()
	if _, err := b.points(long, "-points", fmt.Sprint(points)); err != nil {
		return nil, err
	}
	if _, err := b.points(short, "-points", "1", "-pages", fmt.Sprint(points)); err != nil {
		return nil, err
	}
	out, err := b.openChain(long, short, points)
	if err != nil {
		return nil, err
	}
	more, err := b.maintainChain(long, short, points)
	return append(out, more...), err
}

func (b *bench) openChain(long, short *site, points int) ([]result, error) {
	read := func(s *site) func() (sample, error) {
		return func() (sample, error) {
			settle()
			first, r, err := b.firstByte(s, "bench/disk0@latest", 0)
			r.wall = secondsOf(first)
			return r, err
		}
	}
	a, p, err := b.pair(read(long), read(short))
	if err != nil {
		return nil, err
	}
	r := slower(fmt.Sprintf("open to first byte in a running process, chain of %d", points), "chain of 1", atMost(1.1, "<= 1.1 x its time, < 50 ms"),
		"a lookup asks each index blob until one knows the content, and the long chain has thousands until they are merged", a, p)
	r.reached = r.reached && medianOf(a, wallOf) < 0.05
	r.cpu = ""
	out := []result{r}
	show := func(s *site) func() (sample, error) {
		return func() (sample, error) {
			settle()
			return b.varve(s.conf, "show", "bench/disk0@latest")
		}
	}
	if a, p, err = b.pair(show(long), show(short)); err != nil {
		return nil, err
	}
	cold := atMost(0.25, "< 50 ms more than the chain of 1")
	r = slower(fmt.Sprintf("the same, a process of its own (varve show), chain of %d written without maintenance", points), "chain of 1", cold,
		"the index blobs of each flush are read and merged in memory, and the manifests decoded; the blobs are merged once their epoch of six hours is over", a, p)
	r.reached = medianOf(a, wallOf)-medianOf(p, wallOf) < 0.05
	return append(out, r), nil
}

func (b *bench) maintainChain(long, short *site, points int) ([]result, error) {
	maintain := func(s *site) func() (sample, error) {
		return func() (sample, error) {
			settle()
			return b.varve(s.conf, "maintenance", "run", "--full", "--safety", "none")
		}
	}
	// The first of each repacks what the flushes left; only a copy gives it.
	first := func(s *site) func() (sample, error) {
		return func() (sample, error) {
			kept := s.varve + ".kept"
			if err := sh("cp", "-a", s.varve, kept); err != nil {
				return sample{}, err
			}
			r, err := maintain(s)()
			if err != nil {
				return r, err
			}
			if err := os.RemoveAll(s.varve); err != nil {
				return r, err
			}
			return r, os.Rename(kept, s.varve)
		}
	}
	a, p, err := b.pair(first(long), first(short))
	if err != nil {
		return nil, err
	}
	out := []result{slower(fmt.Sprintf("first full maintenance of a chain of %d, which repacks what each flush left", points), "chain of 1, same unique data",
		atMost(2, "<= 2 x its time"), "three flushes for each point left as many packs and index blobs, and every one is read, merged and deleted once", a, p)}
	for _, s := range []*site{long, short} {
		if _, err := maintain(s)(); err != nil {
			return nil, err
		}
	}
	if a, p, err = b.pair(maintain(long), maintain(short)); err != nil {
		return nil, err
	}
	return append(out, slower(fmt.Sprintf("full maintenance of a chain of %d, later ones", points), "chain of 1, same unique data",
		atMost(2, "<= 2 x its time"), "each point of the chain has a segment index of its own to mark, a directory and a manifest, about 1.2 ms of CPU for each point, while the data is too small to take any time", a, p)), nil
}

// crowdRows open a repository of as many points as four epochs of six hours, a
// day, may bring. The index blobs of three epochs are merged, those of the last
// are not.
func crowdRows(b *bench) ([]result, error) {
	s, err := b.newSite()
	if err != nil {
		return nil, err
	}
	defer s.remove()
	merged := b.cfg.crowd / 4 * 3
	if _, err := b.points(s, "-points", fmt.Sprint(b.cfg.crowd), "-merged", fmt.Sprint(merged), "-volumes", "100", "-size", fmt.Sprint(64<<20), "-quick"); err != nil {
		return nil, err
	}
	var all []sample
	for range b.cfg.runs {
		settle()
		r, err := b.varve(s.conf, "list", "-o", "json")
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	x := medianOf(all, wallOf)
	r := single(fmt.Sprintf("cold open and list of a repository with %d points of 100 volumes written in a day: the index blobs of three of its epochs of six hours merged, those of the last %d points not",
		b.cfg.crowd, b.cfg.crowd-merged),
		seconds(x), x, atMost(5, "< 5 s"), "each of the three flushes of a point leaves an index blob, and all of them are read until their epoch is over")
	r.cpu = fmt.Sprintf("%.2f / -", medianOf(all, cpuOf))
	return []result{r}, nil
}

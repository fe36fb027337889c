package main

import (
	"errors"
	"fmt"
	"time"
)

// with is the same run with another binary of Varve.
func (b *bench) with(varve string) *bench {
	other := *b
	other.cfg.varve = varve
	return &other
}

// beforeRows compare this Varve with an older binary of it, named by -before: whether a change
// made it faster, and nothing slower. CPU seconds are the server's, if there is one.
func beforeRows(b *bench) ([]result, error) {
	if b.cfg.before == "" {
		if b.cfg.rows["before"] {
			return nil, errors.New("name the older binary with -before")
		}
		return nil, nil
	}
	out, err := backupsBefore(b, b.with(b.cfg.before))
	if err != nil {
		return nil, err
	}
	more, err := readsBefore(b, b.with(b.cfg.before))
	return append(out, more...), err
}

// notSlower is the goal of a comparison: as fast as before, except for noise.
var notSlower = atLeast(0.95, "not slower")

func backupsBefore(now, was *bench) ([]result, error) {
	var out []result
	full, err := now.fullList()
	if err != nil {
		return nil, err
	}
	for _, work := range []struct {
		name string
		do   func(s *site) (sample, error)
	}{
		{"full backup of the disk", func(s *site) (sample, error) { return s.save(s.b.disk) }},
		{"backup of the same disk again, all of it compared", func(s *site) (sample, error) {
			if _, err := s.save(s.b.disk); err != nil {
				return sample{}, err
			}
			return s.save(s.b.disk)
		}},
		{"incremental backup from a list of extents", func(s *site) (sample, error) {
			if _, err := s.save(s.b.disk, "--extents", full); err != nil {
				return sample{}, err
			}
			return s.save(s.b.changed, "--extents", s.b.extents)
		}},
	} {
		run := func(b *bench) func() (sample, error) {
			return func() (sample, error) {
				s, err := b.newSite()
				if err != nil {
					return sample{}, err
				}
				defer s.remove()
				return work.do(s)
			}
		}
		a, p, err := now.pair(run(now), run(was))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", work.name, err)
		}
		out = append(out, faster(work.name, "before", notSlower, "see its CPU seconds", a, p))
	}
	return out, nil
}

func readsBefore(now, was *bench) ([]result, error) {
	s, err := was.newSite()
	if err != nil {
		return nil, err
	}
	defer s.remove()
	if _, err := s.save(now.disk); err != nil {
		return nil, err
	}
	twice := func(uri string) (time.Duration, error) {
		if _, err := copyToNull(uri); err != nil {
			return 0, err
		}
		return copyToNull(uri)
	}
	random := func(uri string) (time.Duration, error) {
		set := []string{"--size=256M", "--offset=64M"}
		if err := readSet(uri, set); err != nil {
			return 0, err
		}
		rate, err := randomReads(uri, append(set, "--number_ios=300000", "--norandommap", "--randrepeat=1")...)
		return secondsOf(300000 / rate), err
	}
	cold := func(uri string) (time.Duration, error) {
		rate, err := randomReads(uri, "--size=4G", "--number_ios=20000", "--norandommap", "--randrepeat=1")
		return secondsOf(20000 / rate), err
	}
	var out []result
	for _, work := range []struct {
		name string
		args []string
		do   func(uri string) (time.Duration, error)
	}{
		{"NBD sequential read of a whole point, nothing cached", nil, copyToNull},
		{"the same, second pass", []string{"--cache-size", "4G"}, twice},
		{"the same of a writable export", []string{"--cache-size", "4G", "--writable"}, twice},
		{"NBD random reads of 4 KiB, depth 16, cached", []string{"--cache-size", "4G"}, random},
		{"the same of a writable export", []string{"--cache-size", "4G", "--writable"}, random},
		{"NBD random reads of 4 KiB over the whole disk, nothing decoded yet", []string{"--cache-size", "4G"}, cold},
	} {
		run := func(b *bench) func() (sample, error) {
			c := &chain{site: &site{b: b, dir: s.dir, varve: s.varve, conf: s.conf}}
			return func() (sample, error) {
				settle()
				n, err := c.serveVarve(work.args...)
				if err != nil {
					return sample{}, err
				}
				took, err := work.do(n.uri)
				err = errors.Join(err, n.stop())
				return sample{wall: took, cpu: n.cmd.ProcessState.UserTime() + n.cmd.ProcessState.SystemTime()}, err
			}
		}
		a, p, err := now.pair(run(now), run(was))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", work.name, err)
		}
		out = append(out, faster(work.name, "before", notSlower, "see its CPU seconds", a, p))
	}
	return out, nil
}
